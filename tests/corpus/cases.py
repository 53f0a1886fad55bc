"""The decorator that registers a case, and how a case is run."""

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .record import flatten, mask

Cases = dict[str, "Case"]


@dataclass(frozen=True)
class Case:
    """A function with its arguments; it returns what to record.

    ``rtol`` is above 0 where a schedule uses pow or exp, whose last bit depends on the C library.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    rtol: float = 0.0

    def run(self) -> dict[str, Any]:
        """Return the values by path; an error of the case is one of them, and so are warnings."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = self.function(**self.arguments)
            except Exception as error:
                value = {"raised": error}
        found = flatten(value, whole=bool(self.rtol))
        ours = [one for one in caught if "/corpus/" in one.filename or "fastema" in one.filename]
        texts = {f"{one.category.__name__}: {mask(str(one.message))}" for one in ours}
        texts = {one for one in texts if not one.startswith(("Deprecat", "Future", "Pending"))}
        if self.rtol:
            found["rtol"] = self.rtol
        return found | {f"warning {i}": text for i, text in enumerate(sorted(texts))}


def case(
    cases: Cases, rtol: float | Callable[..., float] = 0.0, **choices: Iterable[Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add one case for each combination of the choices; dicts give names to values."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        named = [
            list(one.items()) if isinstance(one, Mapping) else [(str(x), x) for x in one]
            for one in choices.values()
        ]
        for combination in itertools.product(*named):
            arguments = {k: v for k, (_, v) in zip(choices, combination, strict=True)}
            words = [f"{k}={name}" for k, (name, _) in zip(choices, combination, strict=True)]
            key = " ".join([function.__name__, *words])
            if key in cases:
                raise ValueError(f"two cases are called {key!r}")
            tolerance = rtol(**arguments) if callable(rtol) else rtol
            cases[key] = Case(function, arguments, tolerance)
        return function

    return add


def run_all(cases: Cases, report: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run cases in their order; return the values of each."""
    found = {}
    for name, one in cases.items():
        if report:
            report(name)
        found[name] = one.run()
        sys.stdout.flush()
    return found
