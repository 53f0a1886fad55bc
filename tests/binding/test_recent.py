"""``lerp_``, ``copy_`` and ``swap_`` on lists that they have met before."""

import gc
import weakref

import numpy as np
import pytest
import torch

import fastema
from fastema.binding.recent import RecentRuns
from fastema.errors import ArgumentError, LayoutError
from fastema.plan import _recent

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    rtol = 8e-3 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), wanted.double(), rtol=rtol, atol=rtol / 10)


def pair(count: int = 5) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return tuple([torch.randn(100) for _ in range(count)] for _ in range(2))  # type: ignore[return-value]


def entries() -> int:
    return sum(len(one._entries) for one in _recent.values())


def test_known_lists_take_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair()
    fastema.lerp_(a, b, 0.5)
    fastema.copy_(a, b)
    fastema.swap_(a, b)
    monkeypatch.setattr("fastema.plan.Plan", None)  # must not be built again
    versions = [one._version for one in a + b]
    old = [one.clone() for one in a + b]
    fastema.lerp_(a, list(b), 0.25)
    for found, avg, x in zip(a, old[:5], old[5:], strict=True):
        close(found, avg + 0.25 * (x - avg))
    assert [one._version for one in a + b] == [n + 1 for n in versions[:5]] + versions[5:]
    fastema.swap_(iter(a), b)
    for found, was in zip(a, old[5:], strict=True):
        assert torch.equal(found, was)
    fastema.copy_(a, (one for one in b))
    assert all(map(torch.equal, a, b))
    assert [one._version for one in b] == [n + 1 for n in versions[5:]]
    with pytest.raises(ArgumentError, match="finite"):
        fastema.lerp_(a, b, float("nan"))


def test_nothing_is_kept_alive() -> None:
    a, b = pair()
    for _ in range(2):
        fastema.lerp_(a, b, 0.5)
        fastema.swap_(a, b)
    gone = [weakref.ref(one) for one in a + b]
    del a, b
    gc.collect()
    assert not any(one() is not None for one in gone)


def test_new_tensors_at_used_addresses() -> None:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    for _ in range(3000):
        shape = [(7,), (3, 5), (64,)][random.integers(3)]
        count, dtype = random.integers(1, 4), DTYPES[random.integers(3)]
        a = [torch.randn(shape, dtype=dtype) for _ in range(count)]
        b = [torch.randn(shape) for _ in range(count)]
        for _ in range(random.integers(1, 3)):
            w = random.random()
            wanted = [x.double() + w * (y.double() - x.double()) for x, y in zip(a, b, strict=True)]
            fastema.lerp_(iter(a) if random.random() < 0.5 else list(a), b, w)
            for found, want in zip(a, wanted, strict=True):
                close(found, want)
        if random.random() < 0.3:
            a[0].data = torch.randn(shape, dtype=dtype)
            fastema.lerp_(a, b, 1.0)
            close(a[0], b[0])


def test_changed_tensors_are_checked_again() -> None:
    a, b = pair()
    fastema.lerp_(a, b, 0.5)
    fastema.lerp_(a, b, 0.5)
    a[2].resize_(50)
    with pytest.raises(LayoutError, match="shapes differ"):
        fastema.lerp_(a, b, 0.5)
    b[2] = torch.ones(50)
    fastema.lerp_(a, b, 1.0)
    assert torch.equal(a[2], b[2])
    with pytest.raises(LayoutError):
        fastema.lerp_(a, b[:-1], 0.5)
    with pytest.raises(LayoutError):
        fastema.lerp_(a, a, 0.5)
    with pytest.raises(LayoutError):
        fastema.lerp_(a, [*a[1:], a[0]], 0.5)


def test_few_lists_are_remembered() -> None:
    for _ in range(100):
        fastema.lerp_(*pair(2), 0.5)
    assert entries() <= 16 * len(_recent)


def test_freed_lists_are_forgotten() -> None:
    kept = pair()
    for _ in range(10):
        fastema.lerp_(*pair(3), 0.5)
    fastema.lerp_(*kept, 0.5)
    gc.collect()
    fastema.lerp_(*pair(4), 0.5)
    found = [len(one._tensors) for one in _recent["lerp"]._entries.values() if not one.is_dead()]
    assert 10 in found
    assert len(_recent["lerp"]._entries) <= len(found) + 1


def test_what_is_not_remembered_works_as_before() -> None:
    arrays = [np.zeros(3)], [np.ones(3)]
    nested = [[torch.zeros(3)]], [[torch.ones(3)]]
    repeated = torch.zeros(3)
    runs = RecentRuns(writes_both=False)
    for dst, src in (arrays, nested, ([repeated] * 2, [torch.ones(3)] * 2), ([], [])):
        for _ in range(3):
            fastema.lerp_(dst, src, 0.5)
        assert not runs.step(dst, src, 0.5)
    np.testing.assert_allclose(arrays[0][0], 0.875)
    torch.testing.assert_close(nested[0][0][0], torch.full((3,), 0.875))
    torch.testing.assert_close(repeated, torch.full((3,), 0.875))
