"""What an average averages over, in words."""

from __future__ import annotations

from fastema.rules import Rule, Schedule
from fastema.rules.units import effective_steps

__all__ = ["report"]


def _steps(count: float) -> str:
    rounded = f"{count:,.0f}" if count >= 10 else f"{count:.2g}"
    return f"{rounded} step{'' if rounded == '1' else 's'}"


def _share(part: float) -> str:
    return "no" if part < 0.0005 else f"{100 * part:.3g} %"


def _of_rule(rule: Rule, n: int, every: int) -> str:
    reach = effective_steps(rule, n, every)
    text = (
        f"{rule!r}: the averaged weights are {_steps(reach.mean_age)} old on average "
        f"(standard deviation {_steps(reach.std_age)})"
    )
    if reach.initial_share:
        text += f"; the weights it was built from have {_share(reach.initial_share)} share in it"
    return text


def report(kind: str, schedule: Schedule, step: int, skipped: int) -> str:
    """Lines that say what each average of a schedule averages over at a step."""
    every, start = schedule.update_every, schedule.start_after
    n = (step - start) // every * every
    how = "every step" if every == 1 else f"every {every} steps"
    lines = [f"{kind} after {step:,} updates, which takes the weights in {how}"]
    if start:
        lines[0] += f" from step {start:,} on"
    if skipped:
        lines.append(f"{skipped:,} calls were skipped because a weight was not finite")
    if n <= 0:
        return "\n".join([*lines, "nothing is averaged yet: it is the weights themselves"])
    return "\n".join([*lines, *(_of_rule(rule, n, every) for rule in schedule.rules)])
