"""The machine code of flat updates: packed, fused, prefetching, and free of 64-bit multiplies."""

from __future__ import annotations

import platform
import re

import llvmlite.binding
import pytest

from fastema.kernels import cpu, jit

PAIRS = [("f32", "f32"), ("bf16", "f32"), ("f32", "bf16"), ("bf16", "bf16"), ("f16", "f16")]


@pytest.fixture
def assembly(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the mnemonics are those of x86-64")
    if not llvmlite.binding.get_host_cpu_features().get("fma"):
        pytest.skip("the CPU has no fused multiply-add")
    # What is loaded from the cache has no assembly to look at.
    monkeypatch.setattr(jit, "cache_folder", lambda: None)
    listings = cpu.kernel("lerp", request.param, "flat").inspect_asm()
    return "\n".join(listings.values())


@pytest.mark.parametrize("assembly", PAIRS, indirect=True, ids="-".join)
def test_flat_update_is_vectorised(assembly: str) -> None:
    packed = re.findall(r"\bvfn?madd\d+ps\s.*%([xyz])mm", assembly)
    assert packed, "no packed fused multiply-add"
    widths = {"x": 0, "y": 1, "z": 2}
    assert max(widths[register] for register in packed) >= 1, "128-bit vectors only"
    assert not re.search(r"\bv?pmul(udq|lq|dq)\b", assembly), "integers were widened to 64 bits"
    assert re.search(r"\bprefetcht?\w*\s", assembly), "no prefetch"


@pytest.mark.parametrize("assembly", [("f16", "f16")], indirect=True, ids="-".join)
def test_halves_are_converted_by_the_hardware(assembly: str) -> None:
    assert re.search(r"\bvcvtph2ps\b", assembly)
    assert re.search(r"\bvcvtps2ph\b", assembly)
    assert "__gnu_f2h" not in assembly
    assert "__truncsfhf2" not in assembly
