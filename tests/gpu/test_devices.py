"""Several GPUs in one model, and one that is not the first."""

import os
from collections.abc import Callable

import pytest
import torch

import fastema

from .given import FLAT, Given, assert_all_equal, assert_equal_averages

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


@pytest.fixture
def two(gpu: torch.device) -> list[torch.device]:
    """Two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("only one GPU")
    return [torch.device("cuda", index) for index in range(2)]


def spread(two: list[torch.device], dtype: torch.dtype) -> tuple[list[Given], dict, dict]:
    """Tensors on both, and their twins, under one set of names."""
    givens = [Given(FLAT, dtype, device) for device in two]
    there = {f"{i} {n}": t for i, given in enumerate(givens) for n, t in given.there.items()}
    here = {f"{i} {n}": t for i, given in enumerate(givens) for n, t in given.here.items()}
    for given in givens:
        given.refresh(0)
    return givens, there, here


def test_one_model_on_two_devices_is_that_of_the_cpu(two: list[torch.device]) -> None:
    rule = fastema.rules.warmup(0.99)
    for current, options in ((0, {}), (1, {}), (0, {"capturable": True})):
        givens, there, here = spread(two, torch.bfloat16)
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
            assert tensor.device == two[int(name[0])]


def test_updates_are_on_the_current_streams_of_both_devices(two: list[torch.device]) -> None:
    givens, there, here = spread(two, torch.float32)
    ema, twin = fastema.EMA(there, 0.9), fastema.EMA(here, 0.9)
    streams = [torch.cuda.Stream(device) for device in two]
    for device in two:
        torch.cuda.synchronize(device)
    with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):
        for number, given in enumerate(givens):
            with torch.cuda.stream(streams[number]):
                torch.cuda._sleep(100_000_000)
                given.refresh(number + 1)
        # A stream's block makes its device the current one: both are current streams here.
        ema.update()
    twin.update()
    for device in two:
        torch.cuda.synchronize(device)
    assert_all_equal(ema.shadow, twin.shadow)


def test_devices_are_numbered_among_those_that_the_process_sees(
    gpu: torch.device, python: Callable[..., str]
) -> None:
    """Numbers count among the devices that the process sees."""
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
