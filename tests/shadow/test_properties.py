"""The algebra of averages, and other libraries' numbers."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import swa_utils

import fastema
from fastema import rules

from .kinds import unchanged
from .weights import FLOATS, Net, assert_bits, bits, net, refresh_, snapshot, values

pytestmark = pytest.mark.torch

MIXED = {**FLOATS, "c64": torch.complex64, "c128": torch.complex128, "i64": torch.int64}

# The first example of a dtype pair compiles its kernel.
small = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

Weights = dict[str, torch.Tensor]


def laid_out(shape: tuple[int, ...], code: str, layout: str) -> torch.Tensor:
    dtype = MIXED[code]
    if layout == "transposed":
        return torch.zeros(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])
    if layout == "spaced":
        whole = torch.zeros([2 * n for n in shape], dtype=dtype)
        return whole[tuple(slice(0, 2 * n, 2) for n in shape)]
    if layout == "offset":
        length = torch.Size(shape).numel()
        return torch.zeros(length + 3, dtype=dtype)[3:].view(shape)
    return torch.zeros(shape, dtype=dtype)


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.tuples(st.integers(60, 200))
layouts = st.sampled_from(["plain", "transposed", "spaced", "offset"])


def tensors(codes: st.SearchStrategy[str]) -> st.SearchStrategy[torch.Tensor]:
    return st.builds(laid_out, shapes, codes, layouts)


def weights_of(*codes: str) -> st.SearchStrategy[Weights]:
    sets = st.lists(tensors(st.sampled_from(codes)), min_size=1, max_size=6)
    return sets.filter(lambda found: any(t.dtype != torch.int64 for t in found)).map(
        lambda found: {f"t{i}": tensor for i, tensor in enumerate(found)}
    )


seeds = st.integers(0, 2**31)
decays = st.floats(0.0, 0.99)
stored = st.sampled_from([None, *FLOATS.values()]).filter(lambda d: d is None or d.itemsize > 2)


def run(weights: Weights, seed: int, updates: int, ema: fastema.EMA) -> Iterator[Weights]:
    for n in range(1, updates + 1):
        refresh_(weights, seed + n)
        ema.update()
        yield values(weights)


@small
@given(weights_of(*FLOATS), st.floats(0.0, 0.9), seeds, st.integers(1, 8))
def test_the_average_stays_between_the_weights_it_has_seen(
    weights: Weights, decay: float, seed: int, updates: int
) -> None:
    refresh_(weights, seed)
    low = {name: tensor.clone() for name, tensor in weights.items()}
    high = values(weights)
    ema = fastema.EMA(weights, decay)
    for seen in run(weights, seed, updates, ema):
        for name, tensor in seen.items():
            low[name], high[name] = low[name].minimum(tensor), high[name].maximum(tensor)
    for name, average in ema.shadow.items():
        # One rounding at each update may step out, by half a unit in the last place of the bounds.
        room = updates * torch.finfo(average.dtype).eps * high[name].abs().maximum(low[name].abs())
        assert (average >= low[name] - room).all()
        assert (average <= high[name] + room).all()


@small
@given(weights_of(*MIXED), decays.map(lambda d: min(d, 0.9)), seeds, st.data())
def test_order_and_grouping_do_not_matter(
    weights: Weights, decay: float, seed: int, data: st.DataObject
) -> None:
    """One average of all tensors equals an average of each, to the bit, in whatever order."""
    refresh_(weights, seed)
    order = data.draw(st.permutations(list(weights)))
    together = fastema.EMA(weights, decay)
    shuffled = fastema.EMA({name: weights[name] for name in order}, decay)
    alone = {  # by the same name: random bits are the tensor's own
        name: fastema.EMA({name: tensor}, decay)
        for name, tensor in weights.items()
        if tensor.dtype != torch.int64
    }
    for _ in run(weights, seed, 3, together):
        shuffled.update()
        for one in alone.values():
            one.update()
    expected = snapshot(dict(together.shadow))
    assert_bits({name: shuffled.shadow[name] for name in weights}, expected)
    for name, one in alone.items():
        assert torch.equal(bits(one.shadow[name]), expected[name])


@small
@given(weights_of(*FLOATS), decays.map(lambda d: min(d, 0.9)), seeds)
def test_layout_does_not_matter(weights: Weights, decay: float, seed: int) -> None:
    refresh_(weights, seed)
    plain = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    # To nearest: random bits belong to the places of the elements in memory, gaps left out.
    one, other = (fastema.EMA(w, decay, rounding="nearest") for w in (weights, plain))
    for seen in run(weights, seed, 3, one):
        for name, tensor in seen.items():
            plain[name].copy_(tensor)
        other.update()
    assert_bits(dict(one.shadow), snapshot(dict(other.shadow)))


@small
@given(weights_of(*MIXED), stored, decays.map(lambda d: min(d, 0.9)), seeds)
def test_apply_and_restore_are_the_identity(
    weights: Weights, dtype: torch.dtype | None, decay: float, seed: int
) -> None:
    refresh_(weights, seed)
    ema = fastema.EMA(weights, decay, shadow_dtype=dtype)
    for _ in run(weights, seed, 2, ema):
        pass
    refresh_(weights, seed + 9)
    average = snapshot(dict(ema.shadow))
    with unchanged(weights, ema), ema.swapped():
        assert_bits(ema.state_dict()["shadow"][0], average)


@small
@given(weights_of(*MIXED), stored, seeds)
def test_state_round_trip_is_the_identity(
    weights: Weights, dtype: torch.dtype | None, seed: int
) -> None:
    refresh_(weights, seed)
    ema = fastema.EMA(weights, 0.5, shadow_dtype=dtype)
    for _ in run(weights, seed, 2, ema):
        pass
    with unchanged({}, ema):
        state = ema.state_dict()
        refresh_(weights, seed + 9)
        ema.update()
        ema.load_state_dict(state)


@small
@given(weights_of(*FLOATS), seeds, st.integers(1, 4), st.integers(0, 4))
def test_update_every_and_start_after_only_choose_the_steps(
    weights: Weights, seed: int, every: int, start: int
) -> None:
    """The same as calling ``update`` at those steps only, with the decay to the k-th power."""
    refresh_(weights, seed)

    def averages() -> fastema.EMA:
        return fastema.EMA(weights, 0.5**every, rounding="nearest")

    # To nearest: the steps that random bits depend on are others.
    ema = fastema.EMA(weights, 0.5, update_every=every, start_after=start, rounding="nearest")
    by_hand = averages()
    for n, _ in enumerate(run(weights, seed, 9, ema), 1):
        if n == start:
            by_hand = averages()
        elif n > start and (n - start) % every == 0:
            by_hand.update()
    assert_bits(dict(ema.shadow), snapshot(dict(by_hand.shadow)))


STEPS = 40
Average = dict[str, torch.Tensor]


Peer = Callable[[Net], tuple[Callable[[], object], Callable[[], Average]]]
"""``peer(model)`` builds an average of a package: how to update it, and what it holds."""


def compare(
    peer: Peer, kind: Any = fastema.EMA, dtype: Any = torch.float32, **options: Any
) -> None:
    """Average one model by both, and compare at every tenth step."""
    model = net(0, dtype)
    update, average = peer(model)
    ema = kind(model, **options)
    for n in range(1, STEPS + 1):
        refresh_(model, n)
        update()
        ema.update()
        if n % 10 == 0 or n < 3:
            theirs = average()
            assert theirs.keys() <= set(ema.shadow)
            for name, tensor in theirs.items():
                last_place = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
                torch.testing.assert_close(
                    ema.shadow[name], tensor, rtol=8 * last_place, atol=8 * last_place, msg=name
                )


@dataclass(frozen=True)
class Later(rules.Rule):
    """A rule that has one update behind it."""

    inner: rules.Rule

    def decay(self, n: int) -> float:
        return self.inner.decay(n + 1)


WARMED = rules.inverse_gamma(0.9, 2.0, 0.75)
# Where a second update of theirs, our first, has one behind it: 1 - (1 + 1 / inv_gamma) ** -power.
LATER = Later(WARMED)
EITHER = [True, False]


def named(model: nn.Module, tensors: list[torch.Tensor]) -> Average:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, tensors, strict=True))


def floats_of(module: nn.Module, buffers: bool = False) -> Average:
    """The parameters of a module and, of its buffers, those that are no integer counters."""
    found = dict(module.named_parameters())
    if buffers:
        found |= {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    return {name: tensor.detach() for name, tensor in found.items()}


def averaged_model(copied: bool, **options: Any) -> Peer:
    """``copied``: its first call, which only copies, is made at once."""

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        averaged = swa_utils.AveragedModel(model, **options)
        if copied:
            averaged.update_parameters(model)
        buffers = options.get("use_buffers", False)
        update = partial(averaged.update_parameters, model)
        return update, lambda: floats_of(averaged.module, buffers)

    return peer


@pytest.mark.parametrize("use_buffers", EITHER)
@pytest.mark.parametrize("multi", EITHER)
def test_averaged_model(multi: bool, use_buffers: bool) -> None:
    function = (
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}
        if multi
        else {"avg_fn": swa_utils.get_ema_avg_fn(0.9)}
    )
    peer = averaged_model(True, use_buffers=use_buffers, **function)
    compare(peer, decay=0.9, buffers="average" if use_buffers else "copy")


@pytest.mark.parametrize("warmup", EITHER)
def test_torch_ema(warmup: bool) -> None:
    torch_ema = pytest.importorskip("torch_ema")

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        given = list(model.parameters())
        average = torch_ema.ExponentialMovingAverage(given, 0.9, use_num_updates=warmup)
        return partial(average.update, given), lambda: named(model, average.shadow_params)

    compare(peer, decay=rules.warmup(0.9) if warmup else 0.9)


@pytest.mark.parametrize("warmup", EITHER)
@pytest.mark.parametrize("foreach", EITHER)
def test_ema_pytorch(foreach: bool, warmup: bool) -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    every = {"update_every": 1, "update_after_step": 0, "use_foreach": foreach}
    power = {"inv_gamma": 2.0, "power": 0.75, "min_value": 0.0 if warmup else 0.9}

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        copied = copy.deepcopy(model)
        average = ema_pytorch.EMA(model, ema_model=copied, beta=0.9, **power, **every)
        average.update()  # the first call only copies
        return average.update, lambda: floats_of(average.ema_model)

    compare(peer, decay=LATER if warmup else 0.9)


@pytest.mark.parametrize("warmup", EITHER)
@pytest.mark.parametrize("foreach", EITHER)
def test_diffusers(foreach: bool, warmup: bool) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)
    power = {"inv_gamma": 2.0, "power": 0.75, "min_decay": 0.0 if warmup else 0.9}

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        average = training_utils.EMAModel(
            model.parameters(), decay=0.9, use_ema_warmup=warmup, foreach=foreach, **power
        )
        average.step(model.parameters())  # the first call uses decay 0
        return (
            lambda: average.step(model.parameters()),
            lambda: named(model, average.shadow_params),
        )

    compare(peer, decay=LATER if warmup else 0.9)


@pytest.mark.parametrize("warmup", EITHER)
@pytest.mark.parametrize("shadow", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm(dtype: torch.dtype, shadow: torch.dtype, warmup: bool) -> None:
    from bench.race.peers import timm_model_ema

    try:  # the one file of timm that is needed; the package asks for torchvision
        timm = timm_model_ema()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    power = {"use_warmup": warmup, "warmup_gamma": 2.0, "warmup_power": 0.75}
    steps = iter(range(1, STEPS + 1))

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        average = timm.ModelEmaV3(model, decay=0.9, dtype=shadow, **power)
        # Without a step it does not warm up, and does not copy at the first update either.
        return (
            lambda: average.update(model, next(steps) if warmup else None),
            average.module.state_dict,
        )

    options = {"shadow_dtype": shadow, "buffers": "average"}
    compare(peer, dtype=dtype, decay=WARMED if warmup else 0.9, **options)
