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
def test_tree_averages_match_ema_pytorch(settings: Any, every: int) -> None:
    mine = ours.EMA(tree(), **settings, update_every=every, peer_exact=True)
    yours = theirs.EMA(tree(), **settings, update_every=every)
    for step in range(30):
        run([mine, yours], [step])
        assert mine.get_current_decay() == yours.get_current_decay()
        # Theirs averages a tensor that is in the tree twice twice, so compare the others.
        one, other = ([leaves(ema.ema_pytree)[at] for at in (0, 1, 4, 5)] for ema in (mine, yours))
        torch.testing.assert_close(one, other, atol=1e-13, rtol=0)
    assert mine.ema_pytree["c"] == "no tensor"
