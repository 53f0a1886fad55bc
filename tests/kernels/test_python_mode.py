"""Without the compiler, kernels run as plain Python and give the same bits."""

import json
from collections.abc import Callable

import pytest

SCRIPT = """
    import json
    import os
    import numpy as np
    np.seterr(all="ignore")
    import fastema
    from fastema.layout.device_context import LaunchArgs
    from fastema.engine.program import Program
    from fastema.engine import native, registry
    from fastema.layout.group import Pair
    from tests.support import arrays
    from tests.support.arrays import spec_of

    def numbers(code, seed):
        values = arrays.numbers(90, code, seed, "bits")
        values[:60] = arrays.numbers(60, code, seed)
        return values

    def spec(array, code, step):
        return spec_of(array[::step], code)

    results = []
    FLOATS = (
        ("f32", "f32"), ("f32", "bf16"), ("bf16", "f16"), ("f16", "f64"), ("f64", "f64"),
        ("c64", "c64"),
    )
    # operation, dtypes, step between elements, format of the average
    CASES = [
        *[(op, *pair, 1, "") for op in ("lerp", "copy", "swap") for pair in FLOATS],
        ("add", "f32", "bf16", 1, ""), ("add", "f64", "f64", 1, ""),
        ("lerp", "f32", "bf16", 2, ""), ("swap", "i32", "i32", 3, ""),
        ("park", "f32", "bf16", 1, ""), ("unpark", "f32", "bf16", 1, ""),
        ("lerp", "bf16", "bf16", 1, "bf16~"), ("lerp", "bf16", "f32", 2, "bf16~"),
        ("lerp", "f16", "f32", 1, "f16~"), ("lerp", "f16", "f64", 1, "f16~"),
        ("lerp", "bf16", "f32", 1, "bf16+16"), ("lerp", "bf16", "bf16", 2, "bf16+16"),
        ("lerp", "bf16", "f64", 1, "bf16+16"),
        ("copy", "bf16", "f32", 1, "bf16+16"), ("cast_back", "bf16", "f32", 1, "bf16+16"),
        ("window", "f32", "bf16", 1, ""), ("window", "bf16", "bf16", 2, ""),
        ("window", "f64", "f32", 1, ""),
    ]

    def plain(side, code):
        # NaN payloads may differ.
        if code == "bf16" or side.dtype.kind in "fc":
            reals = side.view(side.real.dtype)
            reals[arrays.is_nan(side, code)] = 0x7FC0 if code == "bf16" else np.nan
        return side.tobytes().hex()

    for i, (operation, dst, src, step, form) in enumerate(CASES):
        a, b = numbers(dst, i), numbers(src, 100 + i)
        sides = [(a, dst), (b, src)]
        low = ring = None
        if form == "bf16+16":
            sides.append((numbers("i16", 200 + i), "i16"))
            low = spec(*sides[-1], step)
        elif operation == "window":
            wide = "f64" if dst == "f64" else "f32"
            sides.append((arrays.numbers(90, wide, i), wide))
            low = spec(*sides[-1], step)
            sides.append((np.concatenate([numbers(src, 300 + i), numbers(src, 301 + i)]), src))
            slots = sides[-1][0]
            ring = spec(slots[:90], src, step), 90 * slots.itemsize
        pair = Pair("t", spec(a, dst, step), spec(b, src, step), form, low, ring)
        program = Program({"all": [pair]})
        for turn in (1, 2, 3, 4) if ring else (7,):
            moment = LaunchArgs((min(turn, 2) if ring else 0.3,), 5, turn, 2, (turn - 1) % 2, turn)
            program.run({"all": operation}, moment)
        for side, code in sides:
            exact = operation.endswith("park")
            held = side.tobytes().hex() if exact else plain(side, code)
            results.append([operation, dst, src, step, form, held])
    python_mode = os.environ.get("NUMBA_DISABLE_JIT") == "1"
    assert registry._loaded
    assert native.is_jit_disabled() == python_mode
    print(json.dumps(results))
"""


@pytest.mark.slow
def test_kernels_without_the_compiler_give_the_same_bits(python: Callable[..., str]) -> None:
    # Forty kernels compile if the cache is empty.
    compiled = json.loads(python(SCRIPT, timeout=240, NUMBA_DISABLE_JIT="0"))
    plain = json.loads(python(SCRIPT, NUMBA_DISABLE_JIT="1"))
    assert len(compiled) == len(plain) > 70
    for one, other in zip(compiled, plain, strict=True):
        assert one == other
