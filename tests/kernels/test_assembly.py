"""The machine code of flat updates: packed, fused, prefetching, and free of 64-bit multiplies.

It is compiled for named processors, so that every machine checks the same code.
"""

import platform
import re
from collections.abc import Callable

import pytest

if platform.machine().lower() not in ("x86_64", "amd64"):
    pytest.skip("the processors and mnemonics are x86-64", allow_module_level=True)

LISTINGS = """
    import sys
    from fastema.kernels import cpu, jit
    for pair in sys.argv[1:]:
        module = jit.compiled(cpu.function("lerp", tuple(pair.split("-")), "flat"))
        print("\\f" + pair)
        print(jit.target_machine().emit_assembly(module))
"""

PAIRS = {
    "haswell": ["f32-f32", "bf16-f32", "f32-bf16", "bf16-bf16", "f16-f16"],
    "sapphirerapids": ["bf16-bf16", "f16-f16"],  # AVX-512 with native instructions for halves
    "znver4": ["f32-f32", "f16-f16"],
}


@pytest.fixture(
    scope="module",
    params=[
        "haswell",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sapphirerapids", "znver4")),
    ],
)
def assembly(request: pytest.FixtureRequest, python: Callable[..., str]) -> dict[str, str]:
    """Compile for one processor and return the assembly of each pair of dtypes."""
    printed = python(
        LISTINGS, *PAIRS[request.param], NUMBA_CPU_NAME=request.param, NUMBA_CPU_FEATURES=""
    )
    listings = (part.split("\n", 1) for part in printed.split("\f")[1:])
    return dict(listings)


@pytest.mark.slow
def test_flat_updates_are_vectorized(assembly: dict[str, str]) -> None:
    for pair, listing in assembly.items():
        packed = re.findall(r"\bvfn?madd\d+ps\s.*%([xyz])mm", listing)
        assert {"y", "z"} & set(packed), f"{pair}: no packed fused multiply-add of 256 bits"
        assert not re.search(r"\bv?pmul(udq|lq|dq)\b", listing), f"{pair}: widened to 64 bits"
        assert re.search(r"\bprefetcht?\w*\s", listing), f"{pair}: no prefetch"


def test_halves_are_converted_by_the_hardware(assembly: dict[str, str]) -> None:
    halves = assembly["f16-f16"]
    assert re.search(r"\bvcvtph2psx?\s.*%[yz]mm", halves)
    assert re.search(r"\bvcvtps2phx?\s.*%[yz]mm", halves)
    assert not re.search(r"__(gnu_)?\w*(hf2|h2f|f2h|hfsf)", halves), "a call into a library"


@pytest.mark.slow
def test_halves_are_averaged_without_hardware_conversion(python: Callable[..., str]) -> None:
    script = """
        import numpy as np
        import fastema
        a, b = np.random.default_rng(3).normal(size=(2, 1000)).astype(np.float16)
        expected = a + 0.25 * (b.astype(np.float64) - a)
        fastema.lerp_([a], [b], 0.25)
        np.testing.assert_allclose(a, expected, rtol=2**-10, atol=1e-6)
    """
    python(script, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
