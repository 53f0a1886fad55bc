"""Where tensors may lie, what PyTorch keeps of them, and memory, in PyTorch's functions."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from fastema.bridges import torch_foreach as foreach
from fastema.errors import DTypeError
from fastema.layout.device_context import LaunchArgs

from ..support.arrays import numbers
from .foreach_runs import (
    REAL,
    SPLIT,
    WINDOWS,
    Array,
    assert_same_bits,
    average_of,
    average_pair,
    kept_as,
    owners,
    pair_of,
    run,
    run_both,
    tensor,
    twin,
    window_pair,
    words,
)

pytestmark = pytest.mark.torch


# -- where tensors lie -----------------------------------------------------------------------------

# Shape, then strides of both sides in elements.
LAYOUTS = {
    "row-major": ((6, 5, 8), (40, 8, 1), (40, 8, 1)),
    "transposed": ((6, 80), (1, 6), (1, 6)),
    "channels last": ((4, 6, 5, 7), (210, 1, 42, 6), (210, 1, 42, 6)),
    "differently permuted": ((6, 5, 8), (40, 8, 1), (1, 48, 6)),
    "0-dim": ((), (), ()),
    "ones": ((1, 1, 1), (1, 1, 1), (9, 4, 7)),
    "empty": ((3, 0, 2), (0, 2, 1), (0, 2, 1)),
    "every second": ((70,), (2,), (2,)),
    "rows of a matrix": ((7, 30), (90, 1), (60, 1)),
    "gaps on one side": ((7, 30), (30, 1), (64, 1)),
    "expanded source": ((9, 70), (70, 1), (0, 1)),
    "one source element": ((9, 70), (70, 1), (0, 0)),
}


def laid_out(values: Array, code: str, strides: tuple[int, ...], start: int = 3) -> Any:
    """A tensor of these values and strides within memory that holds something else."""
    source = tensor(values.copy(), code)
    length = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True) if n)
    filler = torch.full((start + length + 9,), 85, dtype=torch.uint8).to(source.dtype)
    placed = filler.as_strided(values.shape, strides, start)
    if values.size and 0 not in strides:
        placed.copy_(source)
    return placed


MOVES = [
    *(("lerp", *codes) for codes in (("f32", "bf16"), ("f32", "f32"), ("c64", "c64"))),
    *(("lerp", *codes) for codes in (("bf16~", "f32"), (SPLIT, "f32"))),
    *(("copy", *codes) for codes in (("f32", "bf16"), ("i16", "i16"), ("c64", "c64"))),
    *(("swap", *codes) for codes in (("i16", "i16"), ("c64", "c64"), (SPLIT, "f32"))),
    *((operation, "f32", "bf16") for operation in ("park", "unpark", "window")),
]
CASES = [
    pytest.param(*move, layout, id="-".join([*move, layout]))
    for move, layout in product(MOVES, LAYOUTS)
    if not ("source" in layout and move[0] in ("swap", "park", "unpark"))  # which would write it
]


def gaps(one: Any) -> Any:
    """The memory around a tensor's elements."""
    whole = torch.empty(0, dtype=one.dtype).set_(one.untyped_storage()).clone()
    places = torch.arange(len(whole))
    whole[places.as_strided(one.shape, one.stride(), one.storage_offset()).reshape(-1)] = 0
    return words(whole)


@pytest.mark.parametrize(("operation", "dst", "src", "layout"), CASES)
def test_every_way_to_lie_in_memory(operation: str, dst: str, src: str, layout: str) -> None:
    shape, to_strides, of_strides = LAYOUTS[layout]
    size = int(np.prod(shape))

    def made(code: str, seed: int, strides: tuple[int, ...], *slots: int) -> Any:
        values = numbers(size * int(np.prod(slots)), code, seed)
        return laid_out(values.reshape((*slots, *shape)), code, strides, 2 + seed)

    to = made({SPLIT: "bf16"}.get(dst, dst.strip("~")), 1, to_strides)
    of = made(src, 2, of_strides)
    if operation == "window":
        far = (2 + sum(n * s for n, s in zip(shape, to_strides, strict=True)), *to_strides)
        ring = made("bf16", 4, far, 3)
        pair = pair_of(to, of, residual=made("f32", 3, to_strides), ring=ring)
        before, (other,) = ring.clone(), twin([pair])
        run(operation, [pair], (2.0,), 0, 1, 3, 1, 2)
        torch.testing.assert_close(to, (before[0].float() + of.float()) / 2)
        assert torch.equal(ring, torch.stack([before[0], of, before[2]]))
    else:
        residual = made("i16", 3, to_strides) if dst == SPLIT else None
        pair = pair_of(to, of, residual=residual, form=dst if dst == SPLIT or "~" in dst else "")
        (other,) = run_both(operation, [pair], (0.25,))
        if operation != "lerp":
            assert_same_bits([pair], [other])
        elif "~" in dst:  # all but those that were rounded apart before
            assert (to != other.dst.owner).sum() <= size // 100
        else:
            np.testing.assert_allclose(average_of(pair), average_of(other), rtol=1e-6, atol=1e-6)
    for one, two in zip(owners(pair), owners(other), strict=True):
        assert torch.equal(gaps(one), gaps(two))


# -- what torch keeps of a tensor ------------------------------------------------------------------


def test_parameters_keep_what_they_are_and_autograd_is_told() -> None:
    model = [torch.nn.Parameter(tensor(numbers(90, "f32", i), "f32")) for i in (1, 2)]
    avg = [tensor(numbers(90, "f32", i), "f32") for i in (3, 4)]
    pairs = [pair_of(a, p, f"t{i}") for i, (a, p) in enumerate(zip(avg, model, strict=True))]
    run("lerp", pairs, (0.5,))
    assert all(a.grad_fn is None and not a.requires_grad for a in avg)
    loss = sum((p * p).sum() for p in model)
    run("swap", pairs)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- batches and memory ----------------------------------------------------------------------------


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of storages that torch's functions made and that are still held."""

    def __init__(self, known: Sequence[Any]) -> None:
        super().__init__()
        self._known = {one.untyped_storage()._cdata for one in known}
        self._held: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.peak = 0

    def _gone(self, storage: int) -> None:
        self._held[storage] -= 1
        if not self._held[storage]:
            del self._held[storage]
            del self._sizes[storage]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(out):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()._cdata
                if storage not in self._known:
                    self._held[storage] += 1
                    self._sizes[storage] = one.untyped_storage().nbytes()
                    weakref.finalize(one, self._gone, storage)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out


EVERYTHING = [
    *product(["lerp", "lerp_measured", "add"], ["f64", "f32", "bf16~", "f16~", SPLIT], REAL),
    *product(["copy", "cast_back", "swap"], ["f64", "f32", "bf16", SPLIT], REAL),
    *product(["finite"], ["f32"], REAL),
    *product(["park", "unpark"], ["f32"], ["bf16"]),
    *(("window", dst, src) for dst, src, *_ in WINDOWS),
]


@pytest.mark.parametrize(("operation", "dst", "src"), EVERYTHING)
def test_memory_does_not_grow_with_the_tensors(
    operation: str, dst: str, src: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = 3000
    monkeypatch.setattr(foreach, "AT_ONCE", at_once)
    formats = next((one for one in WINDOWS if one[:2] == (dst, src)), ())

    def peak(sizes: Sequence[int]) -> int:
        pairs = []
        for i, size in enumerate(sizes):
            x = tensor(numbers(size, src, i), src)
            if operation == "window":
                pairs.append(window_pair(formats, size, 3))
            else:
                pairs.append(average_pair(dst, numbers(size, kept_as(dst), 9), x))
        once = foreach.substitute(operation, pairs)
        with LiveBytes([one for pair in pairs for one in owners(pair)]) as live:
            once(LaunchArgs((3.0 if operation == "window" else 0.75,), 0, 0, 3, 1, 3))
        return live.peak

    measures = 200  # a few numbers for each piece
    parts = 2 if dst == "c64" else 1
    assert peak([9000]) <= foreach.BYTES * at_once + measures
    assert peak([at_once // 10] * 10) <= foreach.BYTES * at_once + 10 * measures
    assert peak([at_once * 10]) <= peak([at_once]) + 10 * measures * parts


# -- refusals --------------------------------------------------------------------------------------


def test_what_torch_has_no_functions_for_is_refused() -> None:
    ones = torch.ones(3)
    with pytest.raises(DTypeError, match=r"^lerp_: torch has no functions.*lerp_measured"):
        foreach.substitute("lerp_", [pair_of(ones, ones.clone())])
    whole = torch.ones(3, dtype=torch.int64)
    for operation in ("lerp", "lerp_measured", "add", "finite", "window"):
        with pytest.raises(DTypeError, match="i64 is not averaged"):
            foreach.substitute(operation, [pair_of(whole, whole.clone())])
