"""``python -m bench.accuracy``: the error of an update against extended precision, per dtype pair.

Two figures for each pair of dtypes, both on random weights:

- the largest error of one update, in units of the last place that the larger of average and weight
  has in the average's dtype (the result itself may be near zero);
- the error of the average after 1,000 updates, as root mean square relative to the average's own,
  against a recursion in extended precision over the same (rounded) weights.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastema
from bench import machine, report

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
MANTISSA = {"f64": 52, "f32": 23, "f16": 10, "bf16": 7}
SMALLEST_EXPONENT = {"f64": -1022, "f32": -126, "f16": -14, "bf16": -126}
WEIGHTS = (0.5, 0.1, 0.001)
ELEMENTS = 100_000
UPDATES = 1_000
DECAY = 0.999

Wide = NDArray[np.longdouble]


def wide(tensor: torch.Tensor) -> Wide:
    """Return a tensor's values in extended precision."""
    return tensor.double().numpy().astype(np.longdouble)


def last_place(values: Wide, dtype: str) -> Wide:
    """Return the unit in the last place at these values."""
    exponent = np.maximum(np.frexp(values)[1] - 1, SMALLEST_EXPONENT[dtype])
    return np.ldexp(np.longdouble(1), exponent - MANTISSA[dtype])


def one_update(avg_dtype: str, dtype: str, generator: torch.Generator) -> float:
    """Return the largest error of one update, in units of the last place of the larger side."""
    worst = 0.0
    for weight in WEIGHTS:
        avg = torch.randn(ELEMENTS, generator=generator).to(DTYPES[avg_dtype])
        x = torch.randn(ELEMENTS, generator=generator).to(DTYPES[dtype])
        larger = np.maximum(np.abs(wide(avg)), np.abs(wide(x)))
        exact = wide(avg) + np.longdouble(weight) * (wide(x) - wide(avg))
        fastema.lerp_(avg, x, weight)
        worst = max(worst, float(np.max(np.abs(wide(avg) - exact) / last_place(larger, avg_dtype))))
    return worst


def many_updates(avg_dtype: str, dtype: str, generator: torch.Generator) -> float:
    """Return the relative error of an average after many updates of noisy weights."""
    size = ELEMENTS // 10
    target = torch.randn(size, generator=generator)
    x = torch.zeros(size, dtype=DTYPES[dtype])
    avg = target.to(DTYPES[avg_dtype])
    exact = wide(avg)
    plan = fastema.Plan(avg, x)
    weight = 1 - DECAY
    for _ in range(UPDATES):
        x.copy_(target + 0.1 * torch.randn(size, generator=generator))
        exact += np.longdouble(weight) * (wide(x) - exact)
        plan.lerp_(weight)
    error = np.sqrt(np.mean((wide(avg) - exact) ** 2))
    return float(error / np.sqrt(np.mean(exact**2)))


def measure() -> list[dict[str, Any]]:
    """Return one row for each pair of dtypes."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "avg": avg_dtype,
            "weights": dtype,
            "one_update_ulp": one_update(avg_dtype, dtype, generator),
            "many_updates_relative": many_updates(avg_dtype, dtype, generator),
        }
        for avg_dtype, dtype in product(DTYPES, DTYPES)
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the rows as a table."""
    header = result["header"]
    lines = [
        "# Error against extended precision",
        "",
        f"`{header['command']}`, rounding to nearest even. One update: largest of {ELEMENTS:,} "
        f"random weights at each of w = {', '.join(map(str, WEIGHTS))}, in units of the last place "
        f"of the larger of the two. {UPDATES:,} updates: decay {DECAY}, noise of a tenth of the "
        "weights.",
        "",
        "| average | weights | one update, ulp | 1,000 updates, relative |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['avg']} | {row['weights']} | {row['one_update_ulp']:.3f} "
        f"| {row['many_updates_relative']:.1e} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print and keep the table."""
    result = {"header": machine.header("python -m bench.accuracy", "accuracy"), "rows": measure()}
    text = markdown(result)
    print(text)
    report.RESULTS.mkdir(parents=True, exist_ok=True)
    path = report.RESULTS / "accuracy"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
