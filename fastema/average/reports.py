"""Describe in words what an average covers."""

from __future__ import annotations

from fastema.rules import Constant, CumulativeMean, Debiased, Power, Rule, Schedule, Warmup, Window
from fastema.rules.units import effective_steps

__all__ = ["describe_rule", "describe_schedule", "report"]

_NEGLIGIBLE = 0.0005
"""Shares below this are reported as nothing."""


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


def _count(number: float, thing: str) -> str:
    rounded = _number(number)
    return f"{rounded} {thing}{'' if rounded == '1' else 's'}"


def describe_rule(rule: Rule) -> str:
    """Return a rule's average in words, such as ``decay 0.999 with warm-up``."""
    if isinstance(rule, Constant):
        return f"decay {rule.value!r}"
    if isinstance(rule, Warmup):
        return f"decay {rule.limit!r} with warm-up" + (
            f" (offset {rule.offset:g})" if rule.offset != 10 else ""
        )
    if isinstance(rule, Debiased):
        return f"{describe_rule(rule.inner)}, bias-corrected"
    if isinstance(rule, CumulativeMean):
        return "mean of all weights"
    if isinstance(rule, Window):
        return "mean of the " + (
            "last weights" if rule.size == 1 else f"last {rule.size:,} weights"
        )
    if isinstance(rule, Power):
        return f"power function of sigma_rel {rule.sigma_rel:.3g}"
    return repr(rule)


def describe_schedule(schedule: Schedule) -> str:
    """Return a schedule in words, such as ``decay 0.999, every 4 steps, after step 1,000``."""
    parts = ["; ".join(describe_rule(rule) for rule in schedule.rules)]
    if schedule.update_every > 1:
        parts.append(f"every {schedule.update_every:,} steps")
    if schedule.start_after:
        parts.append(f"after step {schedule.start_after:,}")
    return ", ".join(parts)


def _describe_reach(rule: Rule, n: int, every: int) -> str:
    reach = effective_steps(rule, n, every)
    text = f"{describe_rule(rule)}: "
    if reach.mean_age or reach.std_age:
        age = _number(reach.mean_age)
        text += f"lags {age} +/- {_count(reach.std_age, 'step')} behind the model"
    else:
        text += "it is the latest weights"
    if reach.initial_share >= _NEGLIGIBLE:
        text += f"; {100 * reach.initial_share:.3g} % of it is the weights it was built from"
    elif reach.initial_share:
        text += "; nothing is left of the weights it was built from"
    return text


def report(kind: str, schedule: Schedule, step: int, skipped: int) -> str:
    """Return lines that say what each average of a schedule covers after ``step`` updates."""
    every, start = schedule.update_every, schedule.start_after
    lines = [f"{kind} after {_count(step, 'update')}"]
    if every > 1:
        lines[0] += f", one in {every:,} averaged"
    if start:
        lines[0] += f"{'' if every > 1 else ', averaged'} from step {start:,} on"
    if skipped:
        were = "was" if skipped == 1 else "were"
        lines.append(f"{_count(skipped, 'call')} {were} skipped: a weight was not finite")
    n = step - start
    if n < 0:
        lines.append(f"nothing is averaged yet: until step {start:,} it is the weights themselves")
    elif n + schedule.offset < every:
        lines.append(
            "nothing is averaged yet: it is the weights "
            + (f"of step {start:,}" if start else "it was built from")
        )
    else:
        lines += [_describe_reach(rule, n, every) for rule in schedule.rules]
    return "\n".join(lines)
