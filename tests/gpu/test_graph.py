"""Updates in CUDA graphs: replays follow the schedule as if each were a call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema import rules
from fastema.errors import StateError

from ..support.states import nested
from .given import (
    FLAT,
    FLOATS,
    LAYOUTS,
    Expected,
    Twins,
    assert_all_equal,
    assert_equal_averages,
    host,
)

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

STEPS = 1_000


def capture(update: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture one call in a graph without running it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    return graph


class MovingWeights:
    """Weights that change at every step without the host: one of a few sets, scaled."""

    def __init__(self, given: Twins) -> None:
        self._weights = given.there
        self._seen = []
        for seed in range(5):
            given.refresh(seed)
            self._seen.append({name: tensor.clone() for name, tensor in given.there.items()})

    def set_step(self, step: int) -> None:
        """Set the weights to those of a step."""
        for name, tensor in self._weights.items():
            tensor.copy_(self._seen[step % 5][name]).mul_(1 + step / 256)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("bf16", {"decay": rules.warmup(0.9999), "seed": 2**40 + 9}),
        ("bf16", {"decay": rules.warmup(0.999), "shadow_dtype": "float32"}),
        ("f32", {"decay": (0.9, rules.warmup(0.99), rules.power(0.1)), "shadow_dtype": "bf16"}),
        ("f16", {"decay": rules.inverse_gamma(0.999), "update_every": 3, "start_after": 7}),
        ("bf16", {"decay": 0.99, "shadow_dtype": "bf16+16", "zero_debias": True}),
        ("f64", {"decay": 0.99}),
        ("f32", {"window": 5}),
    ],
    ids=["stochastic", "warm-up", "three", "every third", "two halves", "float64", "windowed"],
)
def test_replays_equal_eager_runs(gpu: torch.device, model: str, options: dict[str, Any]) -> None:
    """To the bit: the update weights in the device's table are off by less than float32 shows."""
    given = Twins(LAYOUTS, FLOATS[model], gpu)
    moving = MovingWeights(given)
    kind = fastema.SMA if "window" in options else fastema.EMA
    eager = kind(given.there, **options)
    replayed = kind(given.there, **options, capturable=True)
    moving.set_step(1)
    eager.update()
    replayed.update()
    graph = capture(replayed.update)
    for step in range(2, STEPS + 1):
        moving.set_step(step)
        eager.update()
        graph.replay()
        if step in (2, 3, 10, 100, 500, STEPS):
            assert_equal_averages(replayed, eager)
    assert replayed.num_updates == STEPS
    assert "window" in options or replayed.decay == eager.decay
    for index in range(len(eager.shadows)):
        assert replayed.drift(which=index) == eager.drift(which=index)
    given.assert_rest_untouched()


def test_calls_and_replays_in_any_order_equal_the_eager_run(gpu: torch.device) -> None:
    """On several streams, with swaps, saving and loading in between."""
    given = Twins(FLAT, torch.bfloat16, gpu)
    moving = MovingWeights(given)
    options: dict[str, Any] = {"decay": rules.warmup(0.999), "shadow_dtype": "float32"}
    eager = fastema.EMA(given.there, **options)
    replayed = fastema.EMA(given.there, **options, capturable=True)
    graph = capture(replayed.update)
    side = torch.cuda.Stream()
    for step in range(1, 60):
        moving.set_step(step)
        eager.update()
        if step % 3 == 0:
            replayed.update()
        elif step % 3 == 1:
            graph.replay()
        else:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graph.replay()
            torch.cuda.current_stream().wait_stream(side)
        if step == 20:
            before = {name: host(tensor).tobytes() for name, tensor in given.there.items()}
            with replayed.swapped():
                assert {n: host(t).tobytes() for n, t in given.there.items()} != before
            assert {n: host(t).tobytes() for n, t in given.there.items()} == before
        if step == 40:
            state = replayed.state_dict()
            assert nested(state)["num_updates"] == 40
            graph.replay()  # undone by the load below
            replayed.load_state_dict(state)
        assert_all_equal(replayed.shadow, eager.shadow)
    assert replayed.num_updates == 59
    assert replayed.report() == eager.report()


@pytest.mark.filterwarnings("ignore:.*AccumulateGrad.*:UserWarning")
def test_a_whole_training_step_is_captured(gpu: torch.device) -> None:
    """Forward, backward, optimizer and average in one graph."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 5)).to(gpu)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    rule = rules.warmup(0.99)
    ema = fastema.EMA(net, rule, capturable=True)
    expected = {name: Expected(tensor, name) for name, tensor in ema.shadow.items()}
    x = torch.randn(8, 16, device=gpu)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()
        ema.update()

    def follow(step: int) -> None:
        for name, parameter in net.named_parameters():
            expected[name].update(parameter, rule.weight(step), step)
            expected[name].check(ema.shadow[name], name)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(1, 4):
            train()
            side.synchronize()
            follow(step)
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = capture(train)
    for step in range(4, 40):
        x.normal_()
        graph.replay()
        follow(step)


def test_a_captured_plan_keeps_its_weight(gpu: torch.device) -> None:
    given = Twins(FLAT, torch.float32, gpu)
    given.refresh(0)
    avg = {name: tensor.clone() for name, tensor in given.there.items()}
    expected = {name: Expected(tensor, name) for name, tensor in avg.items()}
    plan = fastema.Plan(avg, given.there)
    plan.lerp_(0.25)  # equal sides: nothing changes
    graph = capture(lambda: plan.lerp_(0.25))
    for seed in range(1, 5):
        given.refresh(seed)
        graph.replay()
        for name, tensor in given.there.items():
            expected[name].update(tensor, 0.25, seed)
            expected[name].check(avg[name], name)


def test_a_replayed_forward_pass_sees_the_average_while_it_is_swapped_in(
    gpu: torch.device,
) -> None:
    """The graph holds the weights' addresses; updates and swaps happen around its replays."""
    torch.manual_seed(5)
    net = nn.Linear(64, 33).to(gpu)
    ema = fastema.EMA(net, rules.warmup(0.99), capturable=True)
    x = torch.randn(8, 64, device=gpu)
    with torch.no_grad():
        ema.update()
        with ema.swapped():  # loads the kernels of the swap
            net(x)
        answer = torch.empty(8, 33, device=gpu)
        forward = capture(lambda: answer.copy_(net(x)))
        update = capture(ema.update)
        for _ in range(5):
            for parameter in net.parameters():
                parameter.mul_(0.8).add_(torch.randn_like(parameter))
            update.replay()
            raw = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
            for weights, applied in ((raw, False), (ema.shadow, True), (raw, False)):
                if applied:
                    ema.apply_shadow()
                forward.replay()
                if applied:
                    ema.restore()
                wanted = nn.functional.linear(x, weights["weight"], weights["bias"])
                torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)
            assert_all_equal({n: t.detach() for n, t in net.named_parameters()}, raw)
    assert ema.num_updates == 6


def test_a_captured_swap_is_exact_at_every_replay(gpu: torch.device) -> None:
    given = Twins(FLAT, torch.bfloat16, gpu)
    given.refresh(0)
    avg = {name: torch.randn_like(tensor) for name, tensor in given.there.items()}
    plan = fastema.Plan(avg, given.there)
    plan.swap_()
    plan.swap_()
    graph = capture(plan.swap_)
    for seed in range(1, 4):
        given.refresh(seed)
        sides = [{name: t.clone() for name, t in side.items()} for side in (avg, given.there)]
        graph.replay()
        assert_all_equal(avg, sides[1])
        assert_all_equal(given.there, sides[0])
        graph.replay()
        assert_all_equal(avg, sides[0])
        assert_all_equal(given.there, sides[1])
    given.assert_rest_untouched()


def test_captures_of_uncapturable_calls_are_refused(gpu: torch.device) -> None:
    weights = [torch.randn(5, device=gpu)]
    ema, plan = fastema.EMA(weights, 0.9), fastema.Plan([torch.randn(5, device=gpu)], weights)
    graph = torch.cuda.CUDAGraph()
    other = torch.zeros(1, device=gpu)
    with torch.cuda.graph(graph):
        other += 1  # PyTorch warns of an empty graph
        with pytest.raises(StateError, match="capturable=True"):
            ema.update()
        with pytest.raises(StateError, match="before"):
            plan.lerp_(0.5)
    assert ema.num_updates == 0
    ema.update()
    plan.lerp_(0.5)
    assert ema.num_updates == 1
