"""``ema.shadow`` is a read-only mapping, and its tensors are no way to lose the average."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

import fastema

from .kinds import KINDS, VARIED, all_of, last, which
from .weights import assert_bits, net, refresh_, snapshot, values

pytestmark = pytest.mark.torch


def test_it_is_a_mapping_in_the_order_of_the_model() -> None:
    model = net()
    ema = fastema.EMA(model)
    shadow = ema.shadow
    assert isinstance(shadow, Mapping)
    assert list(shadow) == list(values(model)) == [name for name, _ in shadow.items()]
    assert len(shadow) == len(values(model))
    assert "scale" in shadow
    assert "nothing" not in shadow
    assert shadow.get("nothing") is None
    with pytest.raises(KeyError, match="nothing"):
        shadow["nothing"]
    with ema.swapped():
        assert "scale" in ema.shadow
        assert "nothing" not in ema.shadow


def test_it_cannot_be_changed() -> None:
    ema = fastema.EMA(net())
    with pytest.raises(TypeError):
        ema.shadow["scale"] = torch.ones(())
    with pytest.raises(TypeError):
        del ema.shadow["scale"]
    for method in ("update", "pop", "clear", "setdefault"):
        assert not hasattr(ema.shadow, method)


def exchanged(tensor: torch.Tensor) -> None:
    tensor.data = torch.full_like(tensor, 9.0)


DONE: dict[str, Callable[[torch.Tensor], object]] = {
    "exchanged": exchanged,
    "reset": lambda tensor: tensor.set_(torch.full_like(tensor, 9.0)),
    "flattened": lambda tensor: setattr(tensor, "data", tensor.data.reshape(-1)),
    "transposed": lambda tensor: tensor.t_(),
    "narrowed": lambda tensor: setattr(tensor, "data", tensor.data.to(torch.float16)),
    "trained": lambda tensor: tensor.requires_grad_(True),
}


@pytest.mark.parametrize("kind", ["EMA", *VARIED])
@pytest.mark.parametrize("change", DONE.values(), ids=DONE)
def test_what_is_done_to_a_tensor_it_handed_out_is_not_done_to_the_average(
    change: Callable[[torch.Tensor], object], kind: str
) -> None:
    """Other than writing its elements, which are the average's own."""
    model, twin = net(), net()
    average, other = KINDS[kind](model), KINDS[kind](twin)
    change(last(average)["hidden.weight"])
    state = average.state_dict(copy=False)
    for tensors in (*state["shadow"], *state.get("residual", ()), *state.get("ring", ())):
        exchanged(tensors["hidden.bias"])
    assert all_of(average) == all_of(other)
    for n in range(1, 6):
        for weights, one in ((model, average), (twin, other)):
            refresh_(weights, n)
            one.update()
    assert all_of(average) == all_of(other)
    assert last(average)["hidden.weight"].shape == model.hidden.weight.shape
    assert not last(average)["hidden.weight"].requires_grad
    with average.swapped(**which(average)), other.swapped(**which(other)):
        assert_bits(model, snapshot(twin))
