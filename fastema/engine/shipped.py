"""The compiled kernels that a wheel ships; GPU kernels are compiled with CUDA 12.9.

``fastema/compiled/gpu/`` has one folder for each compute capability with machine code, and ``ptx``
for GPUs newer than all of them; ``fastema/compiled/cpu/`` has one folder for each CPU level. A file
there holds the kernels of one operation: a line of JSON, ``[[formats, layout, bytes], ...]``, then
the code in this order, compressed together. ``stamp``, beside these folders, is the hash of the
kernel sources: in a checkout whose kernels were edited, shipped kernels never load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
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
    "entry_name",
    "gpu_targets",
    "has_kernels",
    "kernels",
    "read",
    "targets",
    "write",
]

FOLDER: Final = Path(__file__).parents[1] / "compiled"

Device = Literal["cpu", "gpu"]

CAPABILITIES: Final = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))
"""Capabilities with machine code, which also runs on later minor versions of the same major."""

PTX: Final = "ptx"
"""Name of the folder for all other GPUs."""

PTX_CAPABILITY: Final = (8, 0)
"""The lowest capability that the PTX, which the driver compiles, is for."""

_Key = tuple[tuple[str, ...], str]
Kernels = dict[_Key, bytes]
"""Code by formats and layout."""


def entry_name(operation: str) -> str:
    """Return the name of an operation's GPU kernels in their code."""
    return f"fastema_{operation}"


_current_stamp = cache(source_stamp)  # needed for every kernel


def gpu_targets(capability: tuple[int, int]) -> Iterator[str]:
    """Yield the folders whose code runs on a GPU, best first."""
    for major, minor in CAPABILITIES:
        if major == capability[0] and minor <= capability[1]:
            yield f"sm_{major}{minor}"
    if capability >= PTX_CAPABILITY:
        yield PTX


def has_kernels(device: Device) -> bool:
    """Return whether a device has shipped kernels, compiled from the installed sources."""
    try:
        return (FOLDER / device / "stamp").read_text(encoding="ascii") == _current_stamp()
    except OSError:
        return False


def targets(device: Device) -> list[str]:
    """Return the targets that a device's shipped kernels are for; none if there are no kernels."""
    if not has_kernels(device):
        return []
    return sorted(path.name for path in (FOLDER / device).iterdir() if path.is_dir())


def read(
    device: Device, operation: str, formats: tuple[str, ...], layout: str, targets: Iterable[str]
) -> bytes | None:
    """Return a kernel's shipped machine code or PTX for the best target; None if there is none.

    Raises
    ------
    DeviceError
        If a file of the installation is damaged.
    """
    if not has_kernels(device):
        return None
    return kernels(FOLDER / device, operation, targets).get((formats, layout))


def kernels(folder: Path, operation: str, targets: Iterable[str]) -> Kernels:
    """Return all kernels of an operation, for the first target that has them."""
    for target in targets:
        path = folder / target / f"{operation}.xz"
        try:
            modified = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
        return _unpack(path, modified)
    return {}


@lru_cache(maxsize=2)  # an average asks for one operation's kernels in a row; a few MB each
def _unpack(path: Path, modified: int) -> Kernels:
    return dict(_entries(path))


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
    """Write the kernels of one operation to a file."""
    import lzma

    head = json.dumps([[*key, len(code)] for key, code in kernels.items()])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = head.encode() + b"\n" + b"".join(kernels.values())
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
