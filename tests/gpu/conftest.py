"""GPU tests; with ``FASTEMA_GPU_TESTS_ON=cpu``, those that make sense on a CPU run there."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device to test: a GPU, or the CPU if the environment says so."""
    from .given import ON  # skips if the environment wants a GPU and there is none

    return torch.device(ON)


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """Return a GPU, for tests of streams, graphs or allocator statistics; skip on the CPU."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(autouse=True)
def _synchronize(device: torch.device) -> Iterator[None]:
    """Wait for pending work, so that its errors fail this test and not the next one."""
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
