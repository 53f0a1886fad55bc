"""Tensors on a device and twins on the CPU with the same numbers and layouts."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastema.kernels.table import CHUNK

from ..average.stored import code_of, indices, stored
from ..support import reference

ON = os.environ.get("FASTEMA_GPU_TESTS_ON", "cuda")
"""Type of the device that the tests run on."""

if ON == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

FLOATS = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Layout = Callable[..., Tensor]

_POISON = float("nan")

# Each takes `new(*shape)`, which allocates poisoned memory, and returns a view of it. Memory around
# the view must stay unchanged.
FLAT: dict[str, Layout] = {
    "whole": lambda new: new(1_024),
    "odd": lambda new: new(1_200)[3:1_002],
    "one": lambda new: new(9)[5:6],
    "scalar": lambda new: new(7)[2],
    "empty": lambda new: new(0, 3),
    "chunks": lambda new: new(2 * CHUNK + 300)[1 : 2 * CHUNK + 8],
    "matrix": lambda new: new(40, 67)[1:38],
}
SPACED: dict[str, Layout] = {
    "gaps": lambda new: new(3_001)[1::2],
    "columns": lambda new: new(31, 90)[:, 1:70],
    "transposed": lambda new: new(129, 37).t(),
    "channels last": lambda new: new(3, 7, 9, 5).permute(0, 3, 1, 2),
    "permuted": lambda new: new(6, 33, 20).permute(2, 0, 1),
    "everywhere": lambda new: new(9, 10, 11)[::2, 1:, ::3],
}


LAYOUTS = {**FLAT, **SPACED}


class Twins:
    """Named tensors on a device, each a view of poisoned memory, and their twins on the CPU."""

    def __init__(
        self, layouts: Mapping[str, Layout], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._bases: list[tuple[Tensor, Tensor]] = []
        self._dtype = dtype
        self.here = {name: self._view(make, torch.device("cpu")) for name, make in layouts.items()}
        self.there = {name: self._view(make, device) for name, make in layouts.items()}

    def _view(self, make: Layout, device: torch.device) -> Tensor:
        def new(*shape: int) -> Tensor:
            base = torch.full(shape, _POISON, dtype=self._dtype, device=device)
            self._bases.append((base, torch.zeros(shape, dtype=torch.bool, device=device)))
            return base

        view = make(new)
        base, owned = self._bases[-1]
        owned.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        assert base.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        return view

    def refresh(self, seed: int, kind: str = "weights") -> None:
        """Fill both sides with the same new numbers; ``kind="bits"`` draws any bit pattern."""
        generator = np.random.default_rng([seed, 7])
        for name, tensor in self.here.items():
            values = random_tensor(tuple(tensor.shape), self._dtype, generator, kind)
            for side in (self.here, self.there):
                side[name].copy_(values)

    def assert_rest_untouched(self) -> None:
        """Assert that nothing was written around the tensors."""
        for base, owned in self._bases:
            assert bool(base[~owned].isnan().all()), "written outside of a tensor"


def random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, generator: np.random.Generator, kind: str
) -> Tensor:
    """Return a CPU tensor of random nonzero numbers or, with ``kind="bits"``, any bit pattern."""
    if kind == "bits":
        size = int(np.prod(shape)) * dtype.itemsize
        raw = torch.from_numpy(generator.integers(0, 256, size, np.uint8))
        return raw.view(dtype).reshape(shape)
    values = generator.normal(size=shape) * 2.0 ** generator.integers(-6, 3, shape)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def host(tensor: Tensor) -> np.ndarray:
    """Copy a tensor from any device to an array, as stored."""
    return stored(tensor.detach().cpu())


def assert_equal(one: Tensor, other: Tensor, name: str = "") -> None:
    """Assert that dtypes, shapes and bits of tensors are equal, where any NaN equals any other."""
    assert one.dtype == other.dtype, (name, one.dtype, other.dtype)
    assert one.shape == other.shape, (name, one.shape, other.shape)
    a, b = host(one).reshape(-1), host(other).reshape(-1)
    if one.is_floating_point():
        code = code_of(one)
        nan = np.isnan(reference.decode(a, code))
        np.testing.assert_array_equal(nan, np.isnan(reference.decode(b, code)), name)
        a, b = a[~nan], b[~nan]
    wrong = np.flatnonzero(a.view(f"V{a.itemsize}") != b.view(f"V{b.itemsize}"))
    assert not wrong.size, (
        f"{name}: {wrong.size} of {a.size} {one.dtype} differ, the first at {wrong[0]}: "
        f"{a[wrong[0]]!r} and {b[wrong[0]]!r}"
    )


def assert_all_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Assert that two mappings hold equal tensors under equal names."""
    assert list(one) == list(other)
    for name in one:
        assert_equal(one[name], other[name], name)


def run(given: Twins, steps: Iterable[int], *averages: Any) -> None:
    """Run some training steps: fresh weights, then an update of each average."""
    for step in steps:
        given.refresh(step)
        for one in averages:
            one.update()


def assert_equal_averages(one: Any, *others: Any) -> None:
    """Assert that averages are at the same step and equal to the bit."""
    for other in others:
        assert one.num_updates == other.num_updates
        for mine, theirs in zip(one.shadows, other.shadows, strict=True):
            assert_all_equal(mine, theirs)


class Expected:
    """The value of one tensor's average by the specification, on whatever device it is."""

    def __init__(
        self, average: Tensor, name: str, *, which: int = 0, seed: int = 0, random: bool = True
    ) -> None:
        self.value, self.code = host(average), code_of(average)
        self._dtype = average.dtype
        self._key, self._seed = reference.tensor_key(name, which), seed
        self._index = indices(average) if random else None

    def update(self, weights: Tensor, weight: float, step: int) -> None:
        """Apply an update with the current weights."""
        words = None
        if self._index is not None:
            words = reference.random_words(self._seed, step, self._key, self._index)
        x = host(weights)
        self.value = reference.lerp(self.value, x, weight, self.code, code_of(weights), words)

    def check(self, average: Tensor, name: str = "", value: np.ndarray | None = None) -> None:
        """Assert that the average has this value, or the one passed, to the bit except in NaNs."""
        self.value = self.value if value is None else value
        value = np.ascontiguousarray(self.value)
        if self._dtype == torch.bfloat16:
            want = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        else:
            want = torch.from_numpy(value)
        assert_equal(average.reshape(want.shape), want, name)
