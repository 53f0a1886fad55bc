"""What is averaged, copied and left out: frozen parameters, buffers, tensors no kernel knows."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

import fastema
from fastema.bridges import torch as bridge
from fastema.errors import DTypeError
from fastema.layout.dtypes import DTYPES

from .kinds import KINDS
from .weights import (
    BUFFERS,
    bits,
    net,
    refresh_,
)

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffers", ["copy", "average", "skip"])
def test_buffers_of_every_kind(buffers: str, kind: str) -> None:
    """Copied by the updates that do work, averaged as weights are, or left alone."""
    model = net()
    average = KINDS[kind](model, buffers=buffers, update_every=2)
    as_weights = KINDS[kind]({"norm.running_mean": model.norm.running_mean}, update_every=2)
    latest = model.norm.running_mean.clone()
    for n in range(1, 12):
        refresh_(model, n)
        average.update()
        as_weights.update()
        if n % 2 == 0:
            latest = model.norm.running_mean.clone()
        for i, shadow in enumerate(average.shadows):
            if buffers == "skip":
                assert BUFFERS.isdisjoint(shadow)
                continue
            held = shadow["norm.running_mean"]
            want = latest if buffers == "copy" else as_weights.shadows[i]["norm.running_mean"]
            assert torch.equal(bits(held), bits(want))


UNKNOWN = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.ones(3, device="meta"),
    "bits": lambda: torch.ones(3, dtype=torch.uint8).view(torch.bits8),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "expanded": lambda: torch.randn(3).expand(4, 3),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.fixture(params=UNKNOWN)
def unknown(request: pytest.FixtureRequest) -> torch.Tensor:
    """A tensor that no kernel can average."""
    if request.param == "quantized" and torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantized tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed ones are new, quantized ones deprecated
        return UNKNOWN[request.param]()


SMALL = [code for code, kind in DTYPES.items() if not (kind.real or kind.whole)]


@pytest.mark.parametrize("code", SMALL)
def test_buffers_of_8_bits_are_copied_to_the_bit(code: str) -> None:
    dtype = bridge.native(code)
    model, other = net(), net(1)
    for one in (model, other):
        one.register_buffer("scales", torch.arange(256, dtype=torch.uint8).view(dtype))
    raw = model.scales.view(torch.uint8)
    ema = fastema.EMA(model, 0.5, on_nonfinite="skip")
    raw.add_(5)
    ema.update()
    copied = raw.clone()
    raw.mul_(3)
    assert ema.shadow["scales"].dtype == dtype
    assert torch.equal(ema.shadow["scales"].view(torch.uint8), copied)
    with ema.swapped():
        assert torch.equal(raw, copied)
    assert torch.equal(raw, copied * 3)
    ema.copy_to(other)
    assert torch.equal(other.scales.view(torch.uint8), copied)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    resumed = fastema.EMA(other, 0.5)
    other.scales.view(torch.uint8).zero_()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.shadow["scales"].view(torch.uint8), copied)


def test_weights_of_8_bits_are_refused_by_name() -> None:
    small = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(DTypeError, match="small: f8e4m3fn is not averaged"):
        fastema.EMA({"w": torch.randn(3), "small": small})
    model = net()
    model.base = nn.Parameter(small, requires_grad=False)
    with pytest.raises(DTypeError, match=r"base: f8e4m3fn is not averaged"):
        fastema.EMA(model, frozen="average")
    assert "base" in fastema.EMA(model, frozen="copy").shadow
    with pytest.raises(DTypeError, match="'0' is f8e4m3fn"):
        fastema.lerp_([small], [small.clone()], 0.5)
