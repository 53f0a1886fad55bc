"""Snapshots of a PyTorch module's weights, and comparisons of them."""

from typing import Any

import torch

State = dict[str, torch.Tensor]


def snapshot(module: Any) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(found: State, want: State) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def assert_near(found: State, want: State) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=2e-6, atol=2e-7, msg=name
        )


def differ(one: State, other: State) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)
