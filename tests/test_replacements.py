"""The lines that docs/drop-in.md gives to users of libraries without a class in fastema.compat."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastema

PAGE = Path(__file__).parents[1] / "docs" / "drop-in.md"
TITLE = "## Libraries without a class here"

if not PAGE.exists():
    pytest.skip("the page belongs to a checkout", allow_module_level=True)


def read_lines(library: str) -> dict[str, str]:
    """Return our line of code for each of a library's, from the table of the page."""
    section = PAGE.read_text(encoding="utf-8").partition(TITLE)[2].partition("\n## ")[0]
    rows = re.findall(
        rf"^\| {library}\b[^`\n]*`(.+?)`[^|]*\| `(.+?)`[^|]*\|", section, re.MULTILINE
    )
    assert rows, f"{PAGE}, {TITLE[3:]}: no line for {library}"
    return dict(rows)


def follow_optax(line: str, weights: list[Any]) -> list[Any]:
    """Return the averages of weights after each step of a line of Optax."""
    optax = pytest.importorskip("optax")
    average, found, state = weights[0], [], None
    for n, params in enumerate(weights[1:], 1):
        made = eval(line, {**vars(optax), "params": params, "average": average, "n": n})
        if isinstance(made, optax.GradientTransformation):
            average, state = made.update(params, made.init(params) if state is None else state)
        else:
            average = made
        found.append(average)
    return found


@pytest.mark.parametrize("line", read_lines("Optax"))
def test_line_for_optax_has_optax_averages_at_every_step(line: str) -> None:
    jax = pytest.importorskip("jax")
    draw = np.random.default_rng(len(line))
    weights = [
        {"kernel": jax.numpy.asarray(draw.normal(size=(5, 3))), "bias": jax.numpy.asarray(n * 0.5)}
        for n in range(25)
    ]
    names = {"fastema": fastema, "jax": jax, "jnp": jax.numpy, "params": weights[0]}
    average = eval(read_lines("Optax")[line], names)
    for params, theirs in zip(weights[1:], follow_optax(line, weights), strict=True):
        average.update(params)
        for name, ours in average.averaged().items():
            # Optax corrects the bias by 1 - 0.999 ** n in float32, which is off by 1e-5.
            np.testing.assert_allclose(ours, theirs[name], rtol=3e-5, atol=3e-5)
