"""The tests of the GPU; with ``FASTEMA_GPU_TESTS_ON=cpu`` those run that make sense on a CPU."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests run: a GPU, or the CPU where the environment says so."""
    from .given import ON  # which skips where there is no GPU, and the environment wants one

    return torch.device(ON)


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """As `device`, for what only a GPU has: streams, graphs, an allocator that counts."""
    if device.type != "cuda":
        pytest.skip("only a GPU has it")
    return device


@pytest.fixture(autouse=True)
def _settled(device: torch.device) -> Iterator[None]:
    """What a test left pending fails that test, and not the next one."""
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
