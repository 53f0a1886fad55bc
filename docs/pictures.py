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
    """Draw all rules in one picture, on a transparent ground."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastema.tracking.plots.style import EMA, INK, RAW, REPORTED, SMA, STYLE

    drawn = {name: profile(rule) for name, rule in SHOWN.items()}
    drawn[f"SMA, window={WINDOW}"] = [0.0] * (STEPS - WINDOW) + [1.0 / WINDOW] * WINDOW
    colors = (EMA, RAW, SMA, REPORTED, INK)
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
        axes = figure.subplots()
        for (name, shares), color in zip(drawn.items(), colors, strict=True):
            axes.plot(range(1, STEPS + 1), shares, label=name, linewidth=2, color=color)
        axes.set(xlabel="step", ylabel="share in the average after step 1,000", xlim=(0, STEPS))
        axes.set_ylim(0, 0.0135)
        axes.legend(frameon=False, loc="upper left")
        target.parent.mkdir(exist_ok=True)
        figure.savefig(target, metadata={"Software": None})


if __name__ == "__main__":
    draw(TARGET)
    sys.exit(0)
