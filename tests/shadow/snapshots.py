"""Snapshots of averages of any framework's weights, beside those of NumPy's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastema

from ..support.requirements import require_packages


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(31, 3)).astype(np.float32)


def check_snapshots(make: Callable[[np.ndarray], Any], folder: Path) -> None:
    """What is written and read again is what NumPy's arrays give, to the bit."""
    require_packages("safetensors")
    found = []
    for place, of in enumerate((np.array, make)):
        part = folder / str(place)
        made = fastema.PowerEMA({"w": of(drawn(0)), "v": of(drawn(99))}, sigma_rels=(0.05, 0.1))
        for n in range(1, 13):
            made.update({"w": of(drawn(n)), "v": of(drawn(99 + n))})
            if n % 2 == 0:
                fastema.posthoc.save_snapshot(made, part)
        result = fastema.posthoc.synthesize(part, sigma_rel=0.12)
        found.append({name: np.asarray(one).tobytes() for name, one in result.tensors.items()})
    assert found[0].keys() == {"w", "v"}
    assert found[0] == found[1]
