"""Swapping the average into the model and back, to the bit; writes in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import StateError

from .kinds import KINDS, assert_unchanged, build_trained, full_state, which
from .weights import FLOATS, Net, assert_bits, bits, net, refresh_, snapshot, train_, values

pytestmark = pytest.mark.torch

AVERAGES = [*((kind, {}) for kind in KINDS), *(("EMA", {"shadow_dtype": d}) for d in FLOATS)]
"""Every kind, and an EMA in every dtype."""


def build(kind: str = "EMA", model_dtype: str = "f32", shadow_dtype: Any = None) -> tuple[Net, Any]:
    """Return a trained model, whose weights differ from the first ones, and its average."""
    model = net(0, FLOATS[model_dtype])
    options = {} if shadow_dtype is None else {"shadow_dtype": FLOATS[shadow_dtype]}
    average = build_trained(kind, model, **options)
    refresh_(model, 9)
    return model, average


@pytest.mark.parametrize("model_dtype", FLOATS)
@pytest.mark.parametrize(("kind", "options"), AVERAGES)
def test_swap_round_trip_is_exact(kind: str, options: dict[str, str], model_dtype: str) -> None:
    """For each of several averages, and including residuals and rings."""
    model, average = build(kind, model_dtype, **options)
    raw, held = snapshot(model), full_state(average)
    for i, shadow in enumerate(average.shadows):
        # copy_to() joins the halves of a split average into a float32.
        whole = net(3, torch.float32) if "split" in kind else net(3, shadow["scale"].dtype)
        average.copy_to(whole, which=i)
        as_held = values(dict(shadow))
        for _ in range(2):
            with assert_unchanged(model, average), average.swapped(which=i):
                for name, parameter in model.named_parameters():
                    expected = whole.get_parameter(name).detach().to(parameter.dtype)
                    torch.testing.assert_close(parameter.detach(), expected, msg=name)
                    if "split" not in kind and as_held[name].dtype == parameter.dtype:
                        assert torch.equal(bits(parameter), bits(as_held[name]))
                # Callers must see the average unchanged, with its residuals and rings.
                assert full_state(average) == held
                assert average.applied
                assert not torch.equal(bits(model.conv.weight), raw["conv.weight"])
        with assert_unchanged(model, average):
            average.apply_shadow(which=i - len(average.shadows))
            average.restore()
    average.update()


def float32_patterns() -> torch.Tensor:
    """Return every upper half of a float32 with the lower halves at which rounding turns."""
    high = torch.arange(2**16, dtype=torch.int64)
    residual = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    words = (high[:, None] << 16 | residual).reshape(-1)
    return (words - (words >> 31 << 32)).to(torch.int32).view(torch.float32)


def quiet_nans(values_: torch.Tensor) -> torch.Tensor:
    """Make signaling NaNs quiet that would become an infinity when cut to 16 bits."""
    words = values_.view(torch.int32)
    return torch.where(values_.isnan() & (words & 0x7F0000 == 0), words | 0x400000, words)


def test_swap_keeps_every_bit_of_a_float32_average_of_bfloat16_weights() -> None:
    average = float32_patterns()
    raw = torch.arange(2**16).repeat_interleave(6).flip(0).to(torch.uint16).view(torch.bfloat16)
    weights = torch.ones(len(average), dtype=torch.bfloat16)
    ema = fastema.EMA([weights], shadow_dtype=torch.float32)
    ema.shadow["0"].copy_(average)
    weights.copy_(raw)
    before = bits(raw)
    ema.apply_shadow()
    held = weights.float()
    ema.restore()
    assert torch.equal(bits(weights), before)
    assert torch.equal(ema.shadow["0"].view(torch.int32), quiet_nans(average))
    finite = average.isfinite()
    assert torch.equal(held.isnan(), average.isnan())
    off = (held.double() - average.double()).abs()[finite & held.isfinite()]
    other = (average.bfloat16().double() - average.double()).abs()[finite & held.isfinite()]
    assert torch.equal(off, other)  # as close as rounding to nearest even
    assert torch.equal(held.isinf(), average.bfloat16().isinf())


@pytest.mark.parametrize("model_dtype", ["f32", "bf16"])
def test_swap_keeps_every_bit_of_a_split_average(model_dtype: str) -> None:
    average = float32_patterns()
    weights = average.clone()
    ema = fastema.EMA([weights], shadow_dtype="bf16+16")
    # The average is built from float32 weights even if the model is bfloat16.
    model = [weights if model_dtype == "f32" else weights.bfloat16()]
    raw = average.flip(0) if model_dtype == "f32" else average.flip(0).bfloat16()
    model[0].copy_(raw)
    held, half = full_state(ema), ema.shadow["0"].clone()
    with ema.swapped(model):
        if model_dtype == "f32":
            words = average.view(torch.int32)  # NaNs have become quiet
            words = torch.where(average.isnan(), words | 0x400000, words)
            assert torch.equal(model[0].view(torch.int32), words)
        else:
            assert torch.equal(bits(model[0]), bits(half))
    assert torch.equal(bits(model[0]), bits(raw))
    assert full_state(ema) == held


class Stop(BaseException):
    pass


ERRORS = [ValueError, KeyboardInterrupt, SystemExit, Stop, GeneratorExit]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("error", ERRORS)
def test_raw_weights_are_restored_after_an_exception(
    kind: str, model_dtype: str, error: type[BaseException]
) -> None:
    model, average = build(kind, model_dtype)

    def body() -> None:
        with average.swapped(**which(average)):
            raise error

    with assert_unchanged(model, average), pytest.raises(error):
        body()
    average.update()


CALLS: dict[str, Callable[[Any, Net], object]] = {
    "apply": lambda ema, model: ema.apply_shadow(),
    "apply other": lambda ema, model: ema.apply_shadow(net(9)),
    "update": lambda ema, model: ema.update(),
    "update other": lambda ema, model: ema.update(net(9)),
    "copy_to": lambda ema, model: ema.copy_to(net(9)),
    "copy_to own": lambda ema, model: ema.copy_to(model),
    "to dtype": lambda ema, model: ema.to(dtype=torch.float64),
    "to device": lambda ema, model: ema.to("cpu"),
    "load": lambda ema, model: ema.load_state_dict(ema.state_dict()),
}


@pytest.mark.parametrize("shadow_dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("call", CALLS)
def test_calls_are_refused_while_applied(call: str, shadow_dtype: str) -> None:
    model, ema = build(shadow_dtype=shadow_dtype)
    with assert_unchanged(model, ema), ema.swapped():
        held = snapshot(model)
        with pytest.raises(StateError, match=r"restore\(\)"):
            CALLS[call](ema, model)
        assert ema.applied
        assert_bits(model, held)


Write = Callable[[Net], object]


def train_ema(dtype: Any = None, shadow_dtype: Any = None) -> tuple[Net, fastema.EMA[Net]]:
    model = net(0, dtype)
    ema = fastema.EMA(model, 0.5, shadow_dtype=shadow_dtype)
    train_(model, (1, 2), ema)
    refresh_(model, 3)
    return model, ema


def step(model: Net) -> None:
    """Take one training step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dtype = model.conv.weight.dtype
    model(torch.randn(4, 3, 6, 6, dtype=dtype)).square().mean().backward()
    optimizer.step()


WRITES: dict[str, Write] = {
    "training step": step,
    "load_state_dict": lambda model: model.load_state_dict(net(9).state_dict()),
    "one tensor": lambda model: model.head.weight.detach().mul_(2),
}

DTYPES = [("f32", None), ("bf16", "f32"), ("bf16", "bf16+16"), ("f32", "f64")]
NAMES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64, "bf16+16": "bf16+16"}


def in_a_block(model: Net, ema: fastema.EMA[Net], what: str) -> None:
    with ema.swapped():
        WRITES[what](model)


def between_calls(model: Net, ema: fastema.EMA[Net], what: str) -> None:
    ema.apply_shadow()
    WRITES[what](model)
    ema.restore()


def in_a_decorated_function(model: Net, ema: fastema.EMA[Net], what: str) -> None:
    @ema.swapped()
    def evaluate() -> int:
        WRITES[what](model)
        return 1

    evaluate()


@pytest.mark.parametrize("how", [in_a_block, between_calls, in_a_decorated_function])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("what", WRITES)
def test_writes_while_applied_raise_after_the_weights_are_restored(
    what: str, dtypes: tuple[str, str | None], how: Callable[..., None]
) -> None:
    dtype, shadow = dtypes
    model, ema = train_ema(NAMES[dtype], shadow and NAMES[shadow])
    now_holds = r"(?s)now holds the written values:.*'head\.weight'"
    with assert_unchanged(model), pytest.raises(StateError, match=now_holds):
        how(model, ema, what)
    assert not ema.applied
    with assert_unchanged(model, ema), ema.swapped():
        pass
    ema.update()


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_moving_weights_is_not_taken_for_writing(kind: str) -> None:
    model = net(0)
    average = build_trained(kind, model)
    with assert_unchanged(model, average), average.swapped(**which(average)):
        model.eval()
        model(torch.randn(2, 3, 6, 6)).sum().backward()
        model.state_dict()
        model.requires_grad_(False).requires_grad_(True)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        average.state_dict()


def output(model: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, model.head.weight).square().sum()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_autograd_graph_from_before_a_swap_works_after_it(dtypes: tuple[str, str | None]) -> None:
    """Even if the block has written BatchNorm statistics."""
    dtype, shadow = dtypes
    model, ema = train_ema(NAMES[dtype], shadow and NAMES[shadow])
    x = torch.randn(3, 12, dtype=NAMES[dtype], requires_grad=True)
    (expected,) = torch.autograd.grad(output(model, x), x)
    for statistics in (False, True):
        loss = output(model, x)
        for _ in range(2):
            with ema.swapped():
                output(model, x)
                if statistics:
                    fastema.update_bn([torch.randn(8, 3, 6, 6, dtype=NAMES[dtype])], model)
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("later", range(5))
def test_autograd_graph_from_within_a_swap_raises_after_it(later: int) -> None:
    """Even after more training: version counters never return to their value in the block."""
    model, ema = train_ema()
    x = torch.randn(3, 12, requires_grad=True)
    with ema.swapped():
        loss = output(model, x)
    with torch.no_grad():
        for _ in range(later):
            model.head.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_optimizer_step_in_a_block_raises_and_restores_weights(options: dict[str, bool]) -> None:
    def step(model: nn.Module) -> None:
        model(torch.ones(1, 2)).sum().backward()
        torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()

    model = nn.Linear(2, 2)
    ema = fastema.EMA(model, 0.5)
    before = model.weight.detach().clone()
    with pytest.raises(StateError, match="'weight'"), ema.swapped():
        step(model)
    assert torch.equal(model.weight, before)
    with ema.swapped():  # steps of other weights do not count
        step(nn.Linear(2, 2))
