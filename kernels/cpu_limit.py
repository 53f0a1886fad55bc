"""The yardstick: kernels that do nothing but move bytes."""

from __future__ import annotations

import numpy as np

from fastema.kernels.cpu_loops import NOTHING, elementwise
from fastema.kernels.jit import device_fn
from fastema.kernels.words import load_dst, load_src, store_dst


def read_read_write(dst: str, src: str, layout: str):
    """``dst ^= src``: the traffic of an update with the least arithmetic there is."""

    @device_fn
    def element(to, low, ring, of, i, j, w, word):
        store_dst(to, i, load_dst(to, i) ^ load_src(of, j))
        return NOTHING

    return elementwise(element, np.float32, dst, src, layout)
