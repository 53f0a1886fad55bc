"""Without the compiler, kernels run as plain Python and give the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

SCRIPT = """
    import json
    import os
    import numpy as np
    np.seterr(all="ignore")
    import fastema
    from fastema.engine.program import Program
    from fastema.engine import registry
    from fastema.layout.group import Pair
    from fastema.layout.spec import TensorSpec

    STORAGE = {"f64": "f8", "f32": "f4", "f16": "f2", "bf16": "u2", "c64": "c8", "i32": "i4"}

    def numbers(code, seed):
        dtype = np.dtype(STORAGE[code])
        values = np.random.default_rng(seed).integers(0, 256, 90 * dtype.itemsize, np.uint8)
        values = values.view(dtype)
        if code != "bf16" and dtype.kind in "fc":
            values[:60] = np.random.default_rng(seed).normal(size=60)
        return values

    def spec(array, code, step):
        size = len(array[::step])
        return TensorSpec(array.ctypes.data, (size,), (step,), code, "cpu", owner=array)

    results = []
    CASES = [
        *[(op, *pair, 1) for op in ("lerp", "copy", "swap") for pair in (
            ("f32", "f32"), ("f32", "bf16"), ("bf16", "f16"), ("f16", "f64"), ("f64", "f64"),
            ("c64", "c64"))],
        ("lerp", "f32", "bf16", 2), ("swap", "i32", "i32", 3), ("park", "f32", "bf16", 1),
        ("unpark", "f32", "bf16", 1),
    ]
    for i, (operation, dst, src, step) in enumerate(CASES):
        a, b = numbers(dst, i), numbers(src, 100 + i)
        program = Program({"all": [Pair("t", spec(a, dst, step), spec(b, src, step))]})
        program.run({"all": operation}, 0.3)
        for side, code in ((a, dst), (b, src)):
            if code == "bf16":
                side[(side & 0x7FFF) > 0x7F80] = 0x7FC0  # any NaN is as good as another
            elif side.dtype.kind in "fc" and not operation.endswith("park"):
                side.view(side.real.dtype)[np.isnan(side.view(side.real.dtype))] = np.nan
            results.append([operation, dst, src, step, side.tobytes().hex()])
    python_mode = os.environ.get("NUMBA_DISABLE_JIT") == "1"
    kernels = list(registry._made.values())
    assert all(hasattr(one, "signatures") != python_mode for one in kernels)
    print(json.dumps(results))
"""


@pytest.mark.slow
def test_the_same_bits_without_the_compiler(python: Callable[..., str]) -> None:
    compiled = json.loads(python(SCRIPT, NUMBA_DISABLE_JIT="0"))
    plain = json.loads(python(SCRIPT, NUMBA_DISABLE_JIT="1"))
    assert len(compiled) == len(plain) > 40
    for one, other in zip(compiled, plain, strict=True):
        assert one == other


@pytest.mark.torch
def test_the_watch_runs_as_python(python: Callable[..., str]) -> None:
    pytest.importorskip("torch")
    script = """
        import torch
        import fastema
        net = torch.nn.Linear(3, 2)
        avg = {name: torch.ones_like(p) for name, p in net.named_parameters()}
        plan = fastema.Plan(avg, net)
        plan.lerp_(1.0)
        assert all(torch.equal(avg[name], p) for name, p in net.named_parameters())
        net.weight.data = net.weight.data + 1
        plan.lerp_(1.0)
        assert all(torch.equal(avg[name], p) for name, p in net.named_parameters())
        assert not any(watch.changed() for watch in plan._watches)
    """
    python(script, NUMBA_DISABLE_JIT="1")
