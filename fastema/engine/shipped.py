"""The kernels that a wheel brings, compiled; those of GPUs with CUDA 12.9.

``fastema/compiled/gpu/`` has a folder for each compute capability that there is machine code for,
and ``ptx`` for GPUs that are newer than all of them; ``fastema/compiled/cpu/`` has one for each
level of processors. A file there holds the kernels of one operation: a line of JSON, ``[[formats,
layout, bytes], ...]``, and the code in this order, compressed as one. ``stamp``, beside these
folders, says from which kernel sources: those of an edited checkout never load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Final, Literal

from fastema.errors import DeviceError
from fastema.kernels.stamp import source_stamp

__all__ = [
    "CAPABILITIES",
    "FOLDER",
    "PTX",
    "PTX_CAPABILITY",
    "Device",
    "Kernels",
    "current",
    "entry_name",
    "gpu_targets",
    "kernels",
    "read",
    "write",
]

FOLDER: Final = Path(__file__).parents[1] / "compiled"

Device = Literal["cpu", "gpu"]

CAPABILITIES: Final = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))
"""Those with machine code, which also runs on later ones of the same first number."""

PTX: Final = "ptx"
"""The folder for other GPUs."""

PTX_CAPABILITY: Final = (8, 0)
"""The first capability that the PTX is for; the driver compiles it."""

_Key = tuple[tuple[str, ...], str]
Kernels = dict[_Key, bytes]
"""Code by formats and layout."""


def entry_name(operation: str) -> str:
    """Return the name of an operation's kernels in their code."""
    return f"fastema_{operation}"


_sources = cache(source_stamp)  # asked for with every kernel


def gpu_targets(capability: tuple[int, int]) -> Iterator[str]:
    """Yield the folders whose code runs on a GPU, the better one first."""
    for major, minor in CAPABILITIES:
        if major == capability[0] and minor <= capability[1]:
            yield f"sm_{major}{minor}"
    if capability >= PTX_CAPABILITY:
        yield PTX


def current(device: Device) -> bool:
    """Return whether there are kernels, and of these sources."""
    try:
        return (FOLDER / device / "stamp").read_text(encoding="ascii") == _sources()
    except OSError:
        return False


def read(
    device: Device, operation: str, formats: tuple[str, ...], layout: str, targets: Iterable[str]
) -> bytes | None:
    """Return a kernel's machine code or PTX for the first of some targets; None without any.

    Raises
    ------
    DeviceError
        If a file of the installation is damaged.
    """
    if not current(device):
        return None
    return kernels(FOLDER / device, operation, targets).get((formats, layout))


def kernels(folder: Path, operation: str, targets: Iterable[str]) -> Kernels:
    """Return the code of all of an operation's kernels for the first target that has them."""
    for target in targets:
        path = folder / target / f"{operation}.xz"
        if path.exists():
            return dict(_entries(path))
    return {}


def _entries(path: Path) -> Iterator[tuple[_Key, bytes]]:
    try:
        import lzma

        head, code = lzma.decompress(path.read_bytes()).split(b"\n", 1)
        at = 0
        for formats, layout, size in json.loads(head):
            yield (tuple(formats), layout), code[at : at + size]
            at += size
    except (ImportError, OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise DeviceError(
            f"{path} cannot be read ({type(error).__name__}: {error}): reinstall fastema"
        ) from error


def write(path: Path, kernels: Kernels) -> None:
    """Write the kernels of one operation."""
    import lzma

    head = json.dumps([[*key, len(code)] for key, code in kernels.items()])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = head.encode() + b"\n" + b"".join(kernels.values())
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
