"""What some tests cannot do without: skipped where it is missing, failed in continuous integration.

There the dependencies are all installed, and a test that is skipped would go unnoticed.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def needed(found: object, what: str) -> None:
    """Go on only if something was found; for use in a module as well as in a test."""
    if not found:
        if "CI" in os.environ:
            pytest.fail(f"{what} is missing", pytrace=False)
        pytest.skip(f"{what} is missing", allow_module_level=True)


def modules(*names: str) -> None:
    """Go on only if all of these can be imported."""
    for name in names:
        try:
            spec = find_spec(name)
        except ModuleNotFoundError:  # of a package that it would be in
            spec = None
        needed(spec, name)
