"""The lines that docs/drop-in.md gives to users of libraries without a class in fastema.compat."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastema

from .support.replacements import PAGE, read_lines

if not PAGE.exists():
    pytest.skip("the page belongs to a checkout", allow_module_level=True)


def follow_optax(line: str, weights: list[Any]) -> list[Any]:
    """Return the averages of weights after each step of a line of Optax."""
    optax = pytest.importorskip("optax")
    average, found, state = weights[0], [], None
    for n, params in enumerate(weights[1:], 1):
        made = eval(line, {**vars(optax), "params": params, "average": average, "n": n})
        if isinstance(made, optax.GradientTransformation):
            average, state = made.update(params, made.init(params) if state is None else state)
        else:
            average = made
        found.append(average)
    return found


@pytest.mark.parametrize("line", read_lines("Optax"))
def test_line_for_optax_has_optax_averages_at_every_step(line: str) -> None:
    jax = pytest.importorskip("jax")
    draw = np.random.default_rng(len(line))
    weights = [
        {"kernel": jax.numpy.asarray(draw.normal(size=(5, 3))), "bias": jax.numpy.asarray(n * 0.5)}
        for n in range(25)
    ]
    names = {"fastema": fastema, "jax": jax, "jnp": jax.numpy, "params": weights[0]}
    average = eval(read_lines("Optax")[line], names)
    for params, theirs in zip(weights[1:], follow_optax(line, weights), strict=True):
        average.update(params)
        for name, ours in average.averaged().items():
            # Optax corrects the bias by 1 - 0.999 ** n in float32, which is off by 1e-5.
            np.testing.assert_allclose(ours, theirs[name], rtol=3e-5, atol=3e-5)


Weights = Callable[[int], float | None]
"""From the number of a step, from 1, to the weight of the new value; None if nothing changes."""


def mmengine_average(momentum: Callable[[int], float], interval: int = 1) -> Weights:
    """Return the weights of MMEngine's averages; ``momentum`` depends on the steps so far."""

    def weight(n: int) -> float | None:
        return 1.0 if n == 1 else None if (n - 1) % interval else momentum(n - 1)

    return weight


def composer_average(
    half_life: str | None = "1000ba",
    smoothing: float | None = None,
    update_interval: str = "1ba",
) -> Weights:
    """Return the weights of Composer's EMA, which starts as the weights after the first batch."""
    every = int(update_interval.removesuffix("ba"))
    if smoothing is None:
        assert half_life is not None
        smoothing = 2 ** (-every / int(half_life.removesuffix("ba")))
    return lambda n: 1.0 if n == 1 else None if n % every else 1 - smoothing


def d2go_average(state: Any, decay: float, decay_warm_up_factor: float = -1) -> Weights:
    """Return the weights of d2go's EMAUpdater."""

    def weight(n: int) -> float:
        if decay_warm_up_factor < 0:
            return 1 - decay
        return 1 - min(decay, (1 + n) / (decay_warm_up_factor + n))

    return weight


FORMULAS: dict[str, dict[str, Callable[..., Weights]]] = {
    "mmengine": {
        "ExponentialMovingAverage": lambda model, momentum, interval=1: mmengine_average(
            lambda steps: momentum, interval
        ),
        "MomentumAnnealingEMA": lambda model, momentum, gamma: mmengine_average(
            lambda steps: max(momentum, gamma / (gamma + steps))
        ),
        "StochasticWeightAverage": lambda model: mmengine_average(lambda steps: 1 / (steps + 1)),
    },
    "Composer": {"EMA": composer_average},
    "d2go": {"EMAUpdater": d2go_average},
    "mmdet": {
        "ExpMomentumEMA": lambda model, momentum, gamma: mmengine_average(
            lambda steps: (1 - momentum) * math.exp(-(1 + steps) / gamma) + momentum
        )
    },
}
"""By library, its averages as the functions in the table, written from what the library does."""

LINES = [
    (library, line)
    for library in FORMULAS
    for line in read_lines(library)
    if not line.startswith("compute_ema")
]


@pytest.mark.torch
@pytest.mark.parametrize(("library", "line"), LINES)
def test_line_for_a_trainer_has_its_averages_at_every_step(library: str, line: str) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(len(line))
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    weight = eval(line, {"model": model, "state": None, **FORMULAS[library]})
    average = eval(read_lines(library)[line], {"fastema": fastema, "model": model})
    wanted = {name: average.shadow[name].clone() for name in average.averaged_names}
    for n in range(1, 45):
        with torch.no_grad():
            for name, one in model.state_dict().items():
                if one.is_floating_point():
                    one.add_(torch.randn_like(one))
                if name in wanted:
                    wanted[name] += (weight(n) or 0.0) * (one - wanted[name])
        average.update()
        # The first update of mmdet copies all, that of its line 99.95 %; then a part in millions.
        bound = 5e-3 if library == "mmdet" and n == 1 else 1e-5 if library == "mmdet" else 1e-12
        for name, one in wanted.items():
            torch.testing.assert_close(average.shadow[name], one, rtol=bound, atol=bound)


@pytest.mark.torch
def test_line_for_composers_function_interpolates_floats_and_copies_integers() -> None:
    torch = pytest.importorskip("torch")
    (line,) = (one for one in read_lines("Composer") if one.startswith("compute_ema"))
    model, ema_model = (torch.nn.BatchNorm1d(4).double() for _ in range(2))
    model.num_batches_tracked.fill_(7)
    for one in (*model.parameters(), model.running_mean, *ema_model.parameters()):
        torch.nn.init.normal_(one)
    before = {name: one.clone() for name, one in ema_model.state_dict().items()}
    names = {"fastema": fastema, "model": model, "ema_model": ema_model}
    eval(read_lines("Composer")[line], names)
    for name, one in ema_model.state_dict().items():
        wanted = before[name] * 0.99 + model.state_dict()[name] * (1 - 0.99)
        wanted = wanted if one.is_floating_point() else model.num_batches_tracked
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)
