"""Arguments of several commands, checked while the command line is read."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T", int, float)

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
STANDARD = Path("-")  # standard input or output


def number(
    kind: Callable[[str], _T], accepts: Callable[[_T], bool], expected: str
) -> Callable[[str], _T]:
    """A parser for argparse that says what it expected."""

    def parse(text: str) -> _T:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")

    return parse


decay = number(float, lambda value: 0.0 <= value < 1.0, "a number in [0, 1)")
count = number(int, lambda value: value >= 1, "a whole number of at least 1")


def picture_path(text: str) -> Path:
    """Path of a picture, refused before the work for it where it cannot be written."""
    path = Path(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"expected a name that ends in {', '.join(PICTURE_SUFFIXES)}, got {text}"
        )
    return writable_path(text)


def writable_path(text: str) -> Path:
    """Path of a file, refused before the work for it where it cannot be written."""
    path = Path(text)
    if path.is_symlink():
        path = path.resolve()  # or the link would be replaced by the file, or taken away
    existed = path.exists()
    if existed and not path.is_file() and not path.is_dir():
        return path  # a pipe, whose reader takes its first end for the last
    try:
        # Only opening the file tells: permission bits say nothing to root or of a read-only disk.
        with path.open("ab"):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path
