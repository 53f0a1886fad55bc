"""The GPU kernels compile without a GPU: 128 bits at a time, few registers, nothing spilled."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("numba.cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("cuda.core")

from fastema.kernels import cuda

CAPABILITIES = [(8, 0), (9, 0), (10, 0), (12, 0)]

PLAIN = [
    ("lerp", ("f32", "f32")),
    ("lerp", ("f32", "bf16")),
    ("lerp", ("f32", "f16")),
    ("lerp", ("bf16", "bf16")),
    ("lerp", ("f16", "f16")),
    ("lerp", ("bf16+16", "bf16")),
    ("copy", ("f32", "bf16")),
    ("give", ("bf16+16", "f32")),
    ("swap", ("raw4", "raw4")),
    ("swap", ("raw2", "raw2")),
    ("park", ("raw4", "raw2")),
    ("unpark", ("raw4", "raw2")),
    ("finite", ("f32", "bf16")),
]
OTHERS = [
    ("lerp", ("f64", "f64"), 40),
    ("lerp", ("bf16~", "bf16"), 40),
    ("lerp", ("f16~", "f16"), 40),
    ("lerp", ("bf16~", "f32"), 40),
    ("lerp_measured", ("f32", "bf16"), 40),
    ("window", ("f32", "f32", "f32", "f32"), 64),
]


def moved(ptx: str) -> list[int]:
    """Bits of every vector access to global memory."""
    found = re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*?\.v([24])\.[a-z]+(\d+)", ptx)
    return [int(lanes) * int(bits) for lanes, bits in found]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
@pytest.mark.parametrize(("operation", "formats"), PLAIN, ids=str)
def test_plain_kernels(
    operation: str, formats: tuple[str, ...], capability: tuple[int, int]
) -> None:
    made = cuda.compile_kernel(operation, formats, "flat", capability)
    assert made.cubin[:4] == b"\x7fELF"
    assert made.registers <= 32
    assert (made.stack, made.spilled) == (0, 0)
    assert 128 in moved(made.ptx)


@pytest.mark.parametrize(("operation", "formats", "registers"), OTHERS, ids=str)
def test_kernels_that_do_more(operation: str, formats: tuple[str, ...], registers: int) -> None:
    made = cuda.compile_kernel(operation, formats, "flat", (12, 0))
    assert made.registers <= registers
    assert (made.stack, made.spilled) == (0, 0)
    assert 128 in moved(made.ptx)


def test_spaced_elements() -> None:
    made = cuda.compile_kernel("lerp", ("f32", "bf16"), "strided", (9, 0))
    assert made.registers <= 32
    assert (made.stack, made.spilled) == (0, 0)


def test_rounding_is_written_out() -> None:
    """One fused multiply-add per element, as on the CPU, and no contraction besides."""
    made = cuda.compile_kernel("lerp", ("f32", "f32"), "flat", (9, 0))
    assert re.search(r"\bfma\.rn\.f32\b", made.ptx)
    assert not re.search(r"\bmul(\.rn)?\.f32\b", made.ptx)
