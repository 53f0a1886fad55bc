"""Updates and swaps beside and inside of ``torch.compile``, which replays graphs on a GPU."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema import rules

from .given import Expected, assert_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.torch,
    # The compiler gives advice; a warning of fastema's is a RuntimeWarning.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def compiled(device: torch.device) -> Callable[[Any], Any]:
    """Return ``torch.compile`` with replayed graphs; on the CPU, without code generation."""
    torch._dynamo.reset()
    if device.type == "cpu":
        return lambda function: torch.compile(function, backend="aot_eager")
    if find_spec("triton") is None:
        pytest.skip("triton, which torch.compile needs, is not installed")
    return lambda function: torch.compile(function, mode="reduce-overhead")


def build(device: torch.device) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 5)).to(device)


def answer(weights: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what the model answers with these weights, computed without it."""
    hidden = nn.functional.linear(x, weights["0.weight"], weights["0.bias"]).relu()
    return nn.functional.linear(hidden, weights["2.weight"], weights["2.bias"])


def test_a_compiled_model_answers_with_the_average_while_it_is_swapped_in(
    device: torch.device, compiled: Callable[[Any], Any]
) -> None:
    """Its graphs hold addresses: the swap must leave the tensors where they are."""
    model = build(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = rules.warmup(0.99)
    ema = fastema.EMA(model, rule)
    fast = compiled(model)
    x = torch.randn(8, 16, device=device)
    expected = {name: Expected(tensor, name) for name, tensor in ema.shadow.items()}
    for step in range(1, 7):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        fast(x).square().mean().backward()
        optimizer.step()
        ema.update()
        for name, parameter in model.named_parameters():
            expected[name].update(parameter, rule.weight(step), step)
            expected[name].check(ema.shadow[name], name)
        raw = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        with torch.no_grad():
            with ema.swapped():
                torch.compiler.cudagraph_mark_step_begin()
                averaged = fast(x).clone()
            torch.compiler.cudagraph_mark_step_begin()
            restored = fast(x).clone()
        torch.testing.assert_close(averaged, answer(ema.shadow, x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(restored, answer(raw, x), rtol=1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            assert_equal(parameter.detach(), raw[name], name)


def test_an_update_in_a_compiled_function_is_done_at_every_call(
    device: torch.device, compiled: Callable[[Any], Any]
) -> None:
    """The compiler leaves it to the interpreter; no step is baked into a graph."""
    weights = {"w": torch.randn(5_001, device=device), "b": torch.randn(7, device=device)}
    rule = rules.warmup(0.9)
    ema = fastema.EMA(weights, rule)
    expected = {name: Expected(tensor, name) for name, tensor in ema.shadow.items()}

    def train() -> None:
        for tensor in weights.values():
            tensor.mul_(0.75).add_(0.5)
        ema.update()

    step = compiled(train)
    for number in range(1, 6):
        torch.compiler.cudagraph_mark_step_begin()
        step()
        for name, tensor in weights.items():
            expected[name].update(tensor, rule.weight(number), number)
            expected[name].check(ema.shadow[name], name)
    assert ema.num_updates == 5
