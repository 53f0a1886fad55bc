"""A buffer's number: fetched only where somebody else may have written it."""

from __future__ import annotations

import pytest
import torch

from fastema.compat.mirrored import Mirrored

pytestmark = pytest.mark.torch


def test_fetched_once_and_after_others_wrote(on_an_accelerator: list[float]) -> None:
    mirror, buffer = Mirrored(), torch.tensor(3)
    assert [mirror.read(buffer) for _ in range(3)] == [3, 3, 3]
    mirror.count(buffer)
    mirror.count(buffer)
    assert (mirror.read(buffer), int(buffer)) == (5, 5)
    assert on_an_accelerator == [3]
    buffer.fill_(9)
    assert mirror.read(buffer) == 9
    assert mirror.read(buffer.clone()) == 9
    mirror.write(buffer, 12)
    assert mirror.read(buffer) == 12
    assert on_an_accelerator == [3, 9, 9]


def test_on_the_host_every_write_is_seen() -> None:
    mirror, buffer = Mirrored(), torch.tensor(0.5)
    assert mirror.read(buffer) == 0.5
    buffer.data.fill_(0.25)
    assert mirror.read(buffer) == 0.25
    with torch.inference_mode():
        other = torch.tensor(4)
        mirror.count(other)
        assert mirror.read(other) == 5
