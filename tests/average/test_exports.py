"""Every export of an average to bfloat16 weights holds what the model computes with."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fastema
from fastema.distributed import consolidate

pytestmark = pytest.mark.torch


def tied_model() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a bfloat16 model, and the weights whose mean with it lies between two bfloat16."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16).clone()
    values[~torch.isfinite(values) | (values.abs() > 1e30)] = 1.0
    return {"w": values}, (patterns ^ 1).view(torch.bfloat16).where(values != 1.0, values)


def words(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().view(torch.int16).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bf16+16", "float64", "float16", None])
def test_all_exports_of_ties_equal_the_swapped_weights(dtype: str | None, tmp_path: Path) -> None:
    model, other = tied_model()
    ema = fastema.EMA(model, decay=0.5, shadow_dtype=dtype)
    model["w"].copy_(other)
    ema.update()
    with ema.swapped():
        want = words(model["w"]).copy()
    if dtype in ("float32", "bf16+16"):
        even = ((tied_model()[0]["w"].float() + other.float()) / 2).bfloat16()
        assert (want != words(even)).sum() > 1000  # there are ties
    copied = {"w": torch.zeros_like(model["w"])}
    ema.copy_to(copied)
    exports = {"copy_to": copied["w"], "model_state_dict": ema.model_state_dict()["w"]}
    if dtype == "bf16+16":
        exports["shadow"] = ema.shadow["w"]
    file = next(consolidate(ema, tmp_path / "whole").glob("*.safetensors"))
    tensor = np.frombuffer(file.read_bytes()[-2 * want.size :], np.int16)  # the only one
    np.testing.assert_array_equal(tensor, want)
    for name, array in exports.items():
        np.testing.assert_array_equal(words(array), want, err_msg=name)
