"""Draw what each average weighs: ``python docs/pictures.py`` writes docs/pictures/weights.png."""

from __future__ import annotations

import sys
from pathlib import Path

from fastema import rules

TARGET = Path(__file__).parent / "pictures" / "weights.png"
STEPS = 1_000
SHOWN: dict[str, rules.Rule] = {
    "EMA, decay=0.99": rules.constant(0.99),
    "EMA, half_life_fraction(0.1)": rules.half_life_fraction(0.1),
    "SWA": rules.cumulative_mean(),
    "PowerEMA, sigma_rel=0.1": rules.power(sigma_rel=0.1),
}
WINDOW = 100


def profile(rule: rules.Rule, steps: int = STEPS) -> list[float]:
    """Share of the weights of each step, from 1 on, in the average after the last."""
    left, found = 1.0, []
    for n in range(steps, 0, -1):
        weight = rule.weight(n)
        found.append(left * weight)
        left *= 1.0 - weight
    return found[::-1]


def draw(target: Path) -> None:
    """Draw all rules in one picture, on a ground that suits light and dark pages."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), dpi=150, layout="constrained")
    drawn = {name: profile(rule) for name, rule in SHOWN.items()}
    drawn[f"SMA, window={WINDOW}"] = [0.0] * (STEPS - WINDOW) + [1.0 / WINDOW] * WINDOW
    for name, shares in drawn.items():
        axes.plot(range(1, STEPS + 1), shares, label=name, linewidth=2)
    axes.set(xlabel="step", ylabel="share in the average after step 1,000", xlim=(0, STEPS))
    axes.set_ylim(0, 0.0135)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, metadata={"Software": None})


if __name__ == "__main__":
    draw(TARGET)
    sys.exit(0)
