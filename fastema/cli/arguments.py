"""Argument types that several commands share; argparse checks them before a command runs."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastema.errors import ArgumentError, DTypeError

_T = TypeVar("_T", int, float)

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
STANDARD = Path("-")  # standard input or output


def add_state_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--key`` and ``--index``, which choose an average inside a checkpoint."""
    parser.add_argument(
        "--key", help="key of the state inside a larger checkpoint, such as trainer.ema"
    )
    parser.add_argument(
        "--index",
        type=int,
        default=0,
        help="which average to take, if there are several (%(default)s)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Declare ``--force``, without which :func:`check_new` refuses to replace a file."""
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")


def check_new(path: Path, force: bool) -> None:
    """Raise an ArgumentError if a regular file would be replaced without ``--force``."""
    if not force and path.is_file():
        raise ArgumentError(f"{path} exists; add --force to replace it")


def dtype_name(*names: str) -> Callable[[str], str]:
    """Return an argparse type that takes any name of these dtypes, and returns the usual one."""

    def parse(text: str) -> str:
        from fastema.layout.dtypes import NAME_OF, NAMES, describe_names, parse_dtype

        with contextlib.suppress(DTypeError):
            found = NAME_OF[parse_dtype(text).code]
            if found in names:
                return found
        known = describe_names([NAMES[name] for name in names])
        raise argparse.ArgumentTypeError(f"expected {known}, got {text}")

    return parse


def number(
    kind: Callable[[str], _T], accepts: Callable[[_T], bool], expected: str
) -> Callable[[str], _T]:
    """Return an argparse type that parses an accepted number, or reports what was expected."""

    def parse(text: str) -> _T:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")

    return parse


_POWERS = {"K": 3, "M": 6, "B": 9, "T": 12}


def expand(text: str) -> str:
    """Return a number without its suffix: 7e9 for 7B; the suffixes are K, M, B and T."""
    power = _POWERS.get(text[-1:].upper())
    return text if power is None else f"{text[:-1]}e{power}"


def _whole(text: str) -> int:
    value = float(expand(text))  # exact below 2**53
    if not value.is_integer():
        raise ValueError
    return int(value)


decay = number(float, lambda value: 0.0 <= value < 1.0, "a number in [0, 1)")
count = number(int, lambda value: value >= 1, "a whole number of at least 1")
amount = number(
    _whole, lambda value: 1 <= value < 2**53, "a whole number of at least 1, such as 40000 or 250B"
)


def picture_path(text: str) -> Path:
    """Return the path of a picture; refuse an unwritable path or an unknown suffix up front."""
    path = Path(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"expected a name ending in {', '.join(PICTURE_SUFFIXES)}, got {text}"
        )
    return writable_path(text)


def writable_path(text: str) -> Path:
    """Return the path of an output file; refuse an unwritable path before any work is done."""
    path = Path(text)
    if path.is_symlink():
        path = path.resolve()  # so that the link itself is neither replaced nor removed
    existed = path.exists()
    if existed and not path.is_file() and not path.is_dir():
        return path  # a pipe: closing it after a test would look like end of file to its reader
    try:
        # Open the file: permission bits mean nothing to root, or on a read-only file system.
        with path.open("ab"):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path
