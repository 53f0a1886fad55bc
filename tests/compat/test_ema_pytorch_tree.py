"""EMAPytree of ema_pytorch: averages of tensors in lists, tuples and dicts."""

from typing import Any

import ema_pytorch as theirs
import pytest

from fastema.compat import ema_pytorch as ours

from .ema_pytorch_case import nn, torch

NEEDS = ("torch",)

pytestmark = pytest.mark.torch


def tree(dtype: Any = torch.float64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    shared = torch.randn(3, dtype=dtype)
    return {
        "a": [torch.randn(4, 5, dtype=dtype).t(), (torch.randn((), dtype=dtype), shared)],
        "b": {"again": shared, "empty": torch.zeros(0, 2, dtype=dtype)},
        "c": "no tensor",
        "d": nn.Parameter(torch.randn(7, dtype=dtype)),
    }


def leaves(one: Any) -> list[Any]:
    return [x.detach() for x in torch.utils._pytree.tree_flatten(one)[0] if torch.is_tensor(x)]


def train(trees: Any, step: int) -> None:
    for one in trees:
        generator = torch.Generator().manual_seed(step)
        for tensor in {id(x): x for x in [one["a"][0], *one["a"][1], one["d"].data]}.values():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_(noise.to(tensor.dtype))


def run(emas: Any, steps: Any) -> None:
    for step in steps:
        train([ema.pytree for ema in emas], step)
        for ema in emas:
            ema.update()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"update_after_step": 0},
        {"update_after_step": 4, "beta": 0.9, "min_value": 0.2},
        {"update_after_step": 0, "beta": 1.0},
    ],
    ids=str,
)
def test_same_numbers(settings: Any, every: int) -> None:
    mine = ours.EMA(tree(), **settings, update_every=every, peer_exact=True)
    yours = theirs.EMA(tree(), **settings, update_every=every)
    for step in range(30):
        run([mine, yours], [step])
        assert mine.get_current_decay() == yours.get_current_decay()
        # A tensor that is in the tree twice is averaged twice by theirs: compared below.
        one, other = ([leaves(ema.ema_pytree)[at] for at in (0, 1, 4, 5)] for ema in (mine, yours))
        torch.testing.assert_close(one, other, atol=1e-13, rtol=0)
    assert mine.ema_pytree["c"] == "no tensor"


def test_a_tensor_that_is_there_twice_is_averaged_once() -> None:
    settings = {"beta": 0.5, "min_value": 0.5, "update_after_step": 0, "update_every": 1}
    mine, yours = (e.EMA([torch.zeros(2)] * 2, **settings) for e in (ours, theirs))
    for ema in (mine, yours):
        ema.update()
        ema.pytree[0].fill_(1.0)
        ema.update()
    assert mine.ema_pytree[0] is mine.ema_pytree[1]
    assert mine.ema_pytree[0].tolist() == [0.5, 0.5]
    assert yours.ema_pytree[0].tolist() == [0.75, 0.75]


def test_horizon_is_that_of_single_steps() -> None:
    found = []
    for module, every in ((ours, 1), (ours, 10), (theirs, 10)):
        x = torch.zeros(1, dtype=torch.float64)
        ema = module.EMA(x, beta=0.98, min_value=0.98, update_after_step=0, update_every=every)
        for step in range(6001):
            x.fill_(step)
            ema.update()
        found.append(6000 - ema.ema_pytree.item())
    assert found == pytest.approx([49, 45, 490], abs=1)
