"""Reader of scalars from TensorBoard event files.

The tensorboard package parses the events, but the records around them are read here. The package's
own reader imports TensorFlow if it is installed, which takes seconds, and otherwise processes every
byte of every image in Python.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

import numpy as np

from fastema.errors import ArgumentError, format_problems
from fastema.tracking.logs.table import Column, Table

_OTHER_LOGS: Final = ("*.csv", "*.tsv", "*.jsonl", "trainer_state.json")

_OUR_RUNS: Final = ("raw", "sma", "ema")
"""Subfolders that TensorBoardWriter creates; their metrics become `loss_raw`, ..."""

_LONGEST_CHECKED: Final = 65_536
"""Largest event, in bytes, whose checksum is verified; longer events are images and the like."""

Points = list[tuple[int, float]]
"""Steps and values of a tag, in recorded order."""


def read(path: Path) -> Table:
    """Return the scalars of an event file, or of all runs in a folder and its subfolders."""
    files = sorted(path.rglob("*.tfevents.*"), key=_age) if path.is_dir() else [path]
    runs: dict[Path, list[Path]] = {}
    for file in files:
        runs.setdefault(file.parent, []).append(file)
    if not runs:
        raise ArgumentError(f"{path}: no TensorBoard event file in this folder{_others(path)}")
    scalars_of = _scalar_reader()
    found: dict[str, Points] = {}
    for run, members in sorted(runs.items()):
        prefix, suffix = _affixes(run, runs, path)
        scalars = scalars_of(members)
        found.update((f"{prefix}{tag}{suffix}", points) for tag, points in scalars.items())
    if not found:
        raise ArgumentError(f"{path}: no scalars in the TensorBoard event files")
    return _align_steps(found, str(path))


def _age(file: Path) -> list[tuple[int, str]]:
    """Return a key that sorts files by the numbers in their names, such as time: 10 after 9."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _affixes(run: Path, runs: Iterable[Path], top: Path) -> tuple[str, str]:
    """Return the prefix and suffix of the metric names of a run."""
    siblings = [other.name for other in runs if other.parent == run.parent]
    suffix = ""
    if run.name in _OUR_RUNS and sum(name in _OUR_RUNS for name in siblings) > 1:
        run, suffix = run.parent, f"_{run.name}"
    experiments = {other.parent if other.name in _OUR_RUNS else other for other in runs}
    if len(experiments) == 1 or run in (top, top.parent):
        return "", suffix
    return f"{run.relative_to(top).as_posix()}/", suffix


def _others(folder: Path) -> str:
    names = sorted(
        str(file) for name in _OTHER_LOGS for file in itertools.islice(folder.rglob(name), 20)
    )
    return f"; did you mean\n{format_problems(names)}" if names else ""


def _scalar_reader() -> Callable[[Sequence[Path]], dict[str, Points]]:
    """Return a function that reads the event files of a run into its scalars by tag."""
    try:
        protocol = import_module("tensorboard.compat.proto.event_pb2")
        as_array = import_module("tensorboard.util.tensor_util").make_ndarray
        checksum = import_module(
            "tensorboard.compat.tensorflow_stub.pywrap_tensorflow"
        ).masked_crc32c
    except ImportError:
        raise ArgumentError(
            "reading TensorBoard event files needs the tensorboard package: pip install tensorboard"
        ) from None

    def scalars(files: Sequence[Path]) -> dict[str, Points]:
        found: dict[str, Points] = {}
        plugins: dict[str, str] = {}  # only the first value of a tag names the plugin
        for file in files:
            for place, record in _records(file, checksum):
                try:
                    event = protocol.Event.FromString(record)
                except Exception as error:  # the class belongs to protobuf
                    raise _damaged(file, place) from error
                if event.session_log.status == protocol.SessionLog.START:
                    # The run was resumed from an earlier step. As in TensorBoard, drop the points
                    # recorded from that step on.
                    for points in found.values():
                        points[:] = [point for point in points if point[0] < event.step]
                for value in event.summary.value:
                    if value.HasField("metadata"):
                        plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                    if value.HasField("simple_value"):
                        number = value.simple_value
                    elif value.HasField("tensor") and plugins.get(value.tag) == "scalars":
                        number = as_array(value.tensor).item()
                    else:
                        continue
                    found.setdefault(value.tag, []).append((event.step, float(number)))
        return {tag: points for tag, points in found.items() if points}

    return scalars


def _records(file: Path, checksum: Callable[[bytes], int]) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and bytes of each event, without an incomplete last event.

    A record is the length (8 bytes), its checksum (4), the event, and the event's checksum (4).
    """
    place = 0
    with file.open("rb") as opened:
        while len(header := opened.read(12)) == 12:
            length, expected = struct.unpack("<QI", header)
            if checksum(header[:8]) != expected:
                raise _damaged(file, place)
            record, end = opened.read(length), opened.read(4)
            if len(end) < 4:
                return
            if length <= _LONGEST_CHECKED and checksum(record) != struct.unpack("<I", end)[0]:
                raise _damaged(file, place)
            yield place, record
            place += 12 + length + 4


def _damaged(file: Path, place: int) -> ArgumentError:
    return ArgumentError(f"{file} is not a TensorBoard event file, or damaged, at byte {place}")


def _align_steps(found: Mapping[str, Points], source: str) -> Table:
    """Return a table with one row per step, and two rows for a step that a tag has twice."""
    keys: dict[str, list[tuple[int, int]]] = {}
    for tag, points in found.items():
        seen: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
        keys[tag] = [(step, next(seen[step])) for step, _ in points]
    rows = sorted(set(itertools.chain.from_iterable(keys.values())))
    row_of = {key: row for row, key in enumerate(rows)}
    counting = next(name for name in ("step", "global_step", "_step") if name not in found)
    cells = {counting: [str(step) for step, _ in rows]}
    steps = np.array([step for step, _ in rows], np.float64)
    numbers = {counting: Column(np.arange(len(rows)), steps)}
    for tag, points in found.items():
        # Keep the recorded order, even if the steps go back.
        places = [row_of[key] for key in keys[tag]]
        values = [value for _, value in points]
        by_row = {row: repr(value) for row, value in zip(places, values, strict=True)}
        cells[tag] = [by_row.get(row, "") for row in range(len(rows))]
        numbers[tag] = Column(np.array(places, np.int64), np.array(values, np.float64))
    return Table(source, numbers, cells, counted_by=counting)
