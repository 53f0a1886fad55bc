"""Models on several GPUs, and on a GPU that is not the first."""

import os
from collections.abc import Callable

import pytest
import torch

import fastema

from .given import FLAT, Twins, assert_all_equal, assert_equal_averages

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


@pytest.fixture
def gpus(gpu: torch.device) -> list[torch.device]:
    """Return two GPUs; skip if there are fewer."""
    if torch.cuda.device_count() < 2:
        pytest.skip("only one GPU")
    return [torch.device("cuda", index) for index in range(2)]


def create_tensors(gpus: list[torch.device], dtype: torch.dtype) -> tuple[list[Twins], dict, dict]:
    """Create tensors on both devices, and their CPU twins under the same names."""
    givens = [Twins(FLAT, dtype, device) for device in gpus]
    there = {f"{i} {n}": t for i, given in enumerate(givens) for n, t in given.there.items()}
    here = {f"{i} {n}": t for i, given in enumerate(givens) for n, t in given.here.items()}
    for given in givens:
        given.refresh(0)
    return givens, there, here


def test_a_model_on_two_devices_equals_the_cpu(gpus: list[torch.device]) -> None:
    rule = fastema.rules.warmup(0.99)
    for current, options in ((0, {}), (1, {}), (0, {"capturable": True})):
        givens, there, here = create_tensors(gpus, torch.bfloat16)
        with torch.cuda.device(current):
            ema, twin = fastema.EMA(there, (0.9, rule), **options), fastema.EMA(here, (0.9, rule))
            for step in range(1, 8):
                for number, given in enumerate(givens):
                    given.refresh(10 * step + number)
                ema.update()
                twin.update()
            assert torch.cuda.current_device() == current
            assert_equal_averages(ema, twin)
            with ema.swapped(which=1), twin.swapped(which=1):
                assert_all_equal(there, here)
        for name, tensor in ema.shadows[0].items():
            assert tensor.device == gpus[int(name[0])]


def test_updates_use_the_current_stream_of_each_device(gpus: list[torch.device]) -> None:
    givens, there, here = create_tensors(gpus, torch.float32)
    ema, twin = fastema.EMA(there, 0.9), fastema.EMA(here, 0.9)
    streams = [torch.cuda.Stream(device) for device in gpus]
    for device in gpus:
        torch.cuda.synchronize(device)
    with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):
        for number, given in enumerate(givens):
            with torch.cuda.stream(streams[number]):
                torch.cuda._sleep(100_000_000)
                given.refresh(number + 1)
        # Entering a stream's block makes its device current; both streams are current here.
        ema.update()
    twin.update()
    for device in gpus:
        torch.cuda.synchronize(device)
    assert_all_equal(ema.shadow, twin.shadow)


def test_devices_are_numbered_among_the_visible_ones(
    gpu: torch.device, python: Callable[..., str]
) -> None:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    last = seen.split(",")[-1] if seen else str(torch.cuda.device_count() - 1)
    said = python(
        """
        import torch, fastema

        weights = [torch.full((1000,), 2.0, device="cuda")]
        ema = fastema.EMA(weights, 0.5)
        weights[0].fill_(4.0)
        ema.update()
        print(torch.cuda.device_count(), float(ema.shadow["0"].mean()))
        """,
        timeout=120.0,
        quiet=False,
        CUDA_VISIBLE_DEVICES=last,
    )
    assert said.split() == ["1", "3.0"]
