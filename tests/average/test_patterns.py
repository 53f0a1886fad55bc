"""Policies given as patterns of names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import ArgumentError, LayoutError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, 2)
        self.visual = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("expert_bias", torch.ones(2))
        self.register_buffer("table", torch.ones(2), persistent=False)


def shift_tensors(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 1.0


@pytest.mark.parametrize(
    "kind",
    [
        lambda model, **options: fastema.EMA(model, 0.5, **options),
        lambda model, **options: fastema.SWA(model, **options),
        lambda model, **options: fastema.SMA(model, window=2, **options),
        lambda model, **options: fastema.PowerEMA(model, sigma_rels=(0.1,), **options),
    ],
    ids=["EMA", "SWA", "SMA", "PowerEMA"],
)
def test_first_matching_pattern_decides(kind: Any) -> None:
    model = Model()
    policy = {"*.bias": "copy", "text.*": "average", "visual.*": "skip", "frozen.w*": "average",
              "expert_*": "average"}  # fmt: skip
    ema = kind(model, policy=policy)
    assert ema.averaged_names == {"text.weight", "frozen.weight", "expert_bias"}
    assert ema.skipped_names == {"visual.weight", "table"}
    assert set(ema.shadow) - ema.averaged_names == {"text.bias", "visual.bias", "frozen.bias"}
    begun = model.expert_bias.clone()
    for _ in range(3):
        shift_tensors(model)
        ema.update()
    assert torch.equal(ema.shadow["text.bias"], model.text.bias)
    assert not torch.equal(ema.shadow["expert_bias"], model.expert_bias)
    assert not torch.equal(ema.shadow["expert_bias"], begun)
    # Tensors that a pattern matches may be frozen or unfrozen later.
    model.visual.requires_grad_(False)
    model.frozen.requires_grad_(True)
    ema.update()
    with ema.swapped():
        pass


def test_invalid_patterns_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)no name matches.*'expert'.*'text\.weight'"):
        fastema.EMA(Model(), policy={"*.bias": "copy", "expert": "average"})
    with pytest.raises(ArgumentError, match="never averaged"):
        fastema.EMA(Model(), policy={"table": "average"})
    with pytest.raises(ArgumentError, match=r"policy\['\*'\]='mean'"):
        fastema.EMA(Model(), policy={"*": "mean"})  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match="expected a mapping of name patterns"):
        fastema.EMA(Model(), policy="average")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="nothing to average"):
        fastema.EMA(Model(), policy={"*": "skip"})


class Adapted(nn.Module):
    """A frozen layer with low-rank adapters, as PEFT names them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.add("default")

    def add(self, name: str) -> None:
        self.lora_A[name] = nn.Parameter(torch.randn(2, 4))
        self.lora_B[name] = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapters = zip(self.lora_A.values(), self.lora_B.values(), strict=True)
        return self.base(x) + sum((x @ a.T @ b.T for a, b in adapters), torch.zeros(()))


def test_adapters_that_a_pattern_skips_may_be_added_and_removed() -> None:
    model = Adapted()
    ema = fastema.EMA(model, decay=0.5, policy={"*.default": "average", "*": "skip"})
    assert set(ema.shadow) == {"lora_A.default", "lora_B.default"}
    model.add("other")
    shift_tensors(model.lora_A)
    ema.update()
    expected = model.lora_A["default"].detach() - 0.5
    torch.testing.assert_close(ema.shadow["lora_A.default"], expected)
    with ema.swapped():
        torch.testing.assert_close(model.lora_A["default"].detach(), expected)
    del model.lora_A["other"], model.lora_B["other"]
    ema.update()
    unknown = fastema.EMA(model, decay=0.5, policy={"base.*": "skip"})
    model.add("other")
    with pytest.raises(LayoutError, match=r"'lora_A\.other' is new in the model"):
        unknown.update()
