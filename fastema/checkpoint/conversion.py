"""Convert averages from one library's checkpoint layout to another's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Final, NamedTuple

from fastema.average.reports import describe_schedule
from fastema.average.state import LOG_DECAYS, pack
from fastema.checkpoint.detection import known_layouts
from fastema.checkpoint.files import atomic_write_path, refuse_ending
from fastema.checkpoint.inspection import verify_files
from fastema.checkpoint.layout import Layout, StoredAverage, StoredContents, import_torch, with_keys
from fastema.checkpoint.merge import copy, refuse_source
from fastema.checkpoint.source import Checkpoint, drop_tied_names, open_checkpoint
from fastema.checkpoint.state import read_tensors, write_tensors
from fastema.checkpoint.stored import load
from fastema.errors import ArgumentError, CheckpointError, StorageError, format_problems
from fastema.rules import Constant, CumulativeMean, Power, Rule, Schedule, Window
from fastema.rules.checks import validate_decay

__all__ = ["Conversion", "convert", "writable_libraries"]

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes
    ----------
    path : Path
        The file that was written.
    source : StoredAverage
        The average that was converted.
    to : str
        The library in whose layout the file is.
    lost : list of str
        What this layout cannot store, and remarks about the source, one phrase each.
    """

    path: Path
    source: StoredAverage
    to: str
    lost: list[str] = field(default_factory=list)


def convert(
    src: _Path,
    dst: _Path,
    *,
    to: str,
    names: _Path | Sequence[str] | None = None,
    decay: float | None = None,
    key: str | None = None,
    index: int = 0,
) -> Conversion:
    """Write an average in the layout of another library.

    Parameters
    ----------
    src : path
        A file or folder that :func:`load` can read.
    dst : path
        The file to write; with ``to="safetensors"`` also a new folder, if the source is a folder
        and the name does not end in ``.safetensors``. A file is replaced atomically: a failed
        conversion leaves the old one unchanged.
    to : str
        "fastema" (for :func:`load_into`), "safetensors" (the averaged weights alone), "swa_utils",
        "timm", "torch_ema", "ema_pytorch", "diffusers", "litema", "mmengine" or "d2go": what
        the library's class loads. For timm and d2go it is an entry of the trainer's checkpoint,
        ``"state_dict_ema"`` or ``"ema_state"``.
    names : path or sequence of str, optional
        The names of ``model.parameters()`` in order: a list, a ``.txt`` file with one name on each
        line, or an average of fastema of that model. Needed if the target has names and the source
        is a list (torch_ema, diffusers, NeMo) or has names without dots (LitEma); a file of
        ``torch.save`` with the model's state then is enough if its shapes fit. Also needed if the
        target stores parameters alone (torch_ema, diffusers, litema) and the source does not tell
        them from buffers, as averages of fastema and of Composer do.
    decay : float, optional
        Decay of further updates, in [0, 1); replaces the schedule of the source. Needed if the
        target layout stores a decay and the source does not record one.
    key, index
        See :func:`load`.

    Raises
    ------
    CheckpointError
        If ``src`` cannot be read, ``names`` do not fit its tensors, or ``dst`` has the extension of
        another format.
    ArgumentError
        If ``to`` is unknown, or a decay or names are needed but missing.
    StorageError
        If ``dst`` cannot be written.

    Notes
    -----
    The average must fit in memory, except with ``to="safetensors"``, which streams it.

    Examples
    --------
    >>> import tempfile, pathlib, torch
    >>> from fastema.checkpoint import convert
    >>> from fastema.compat.torch_ema import ExponentialMovingAverage
    >>> model = torch.nn.Linear(3, 2)
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> ema = ExponentialMovingAverage(model.parameters(), decay=0.99)
    >>> torch.save(ema.state_dict(), folder / "ema.pt")
    >>> done = convert(folder / "ema.pt", folder / "d2go.pt", to="d2go", names=["weight", "bias"])
    >>> list(torch.load(folder / "d2go.pt")["ema_state"])
    ['weight', 'bias']
    >>> done.lost
    ['the number of updates, 0', 'the schedule, decay 0.99 with warm-up']
    """
    if to not in _targets():
        raise ArgumentError(f"to={to!r}: expected one of {', '.join(_targets())}")
    (_, wanted, write), out = _targets()[to], Path(dst)
    refuse_ending(out, torch=to not in ("fastema", "safetensors"))
    source = load(src, key=key, index=index)
    if source.library == "fastema":
        verify_files(source)  # the new file has checksums of its own
    if decay is not None:
        kept = {k: v for k, v in source.options.items() if k not in ("kind", LOG_DECAYS)}
        constant = Schedule(Constant(validate_decay(decay)))
        source = replace(source, schedule=constant, options=kept)
    source, lost = _arrange_tensors(source, _targets()[to], _model_names(names, out))
    lost += source.notes
    if source.library == "model":
        lost.append("an average: the source holds only a model's weights")
    if source.num_updates is not None and not wanted.counts:
        lost.append(f"the number of updates, {source.num_updates}")
    schedule = source.schedule
    if schedule is not None and not wanted.keeps(schedule):
        lost.append(f"the schedule, {describe_schedule(schedule)}")
    if source.weights is not None and not wanted.weights:
        lost.append("the training weights, which the source holds too")
    refuse_source(out, source.checkpoint)
    write(source, out)
    return Conversion(out, source, to, lost)


# -- names -----------------------------------------------------------------------------------------

_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")


class _ModelNames(NamedTuple):
    """The names of a model's parameters in order.

    ``state`` is set if they come from a model's state, whose tensors may be buffers too.
    """

    names: list[str]
    state: Checkpoint | None = None


def _may_be_parameter(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor may be a parameter, judging by its name and dtype."""
    inner = name.rpartition(".")[2]
    return checkpoint.tensors[name].kind.real is not None and inner not in _STATISTICS


def _model_names(given: _Path | Sequence[str] | None, out: Path) -> _ModelNames | None:
    """Return the names in an argument: a list, a text file, an average or a model's state."""
    if given is None:
        return None
    if not isinstance(given, str | os.PathLike):
        return _ModelNames(list(given))
    path = Path(given)
    if os.path.realpath(out) == os.path.realpath(path):
        raise CheckpointError(f"{out} is the file that names are taken from; name another output")
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        return _ModelNames([line.strip() for line in lines if line.strip()])
    found = load(path)
    refuse_source(out, found.checkpoint, "the model that names are taken from")
    if found.parameters is not None:
        return _ModelNames(found.parameters)
    if found.checkpoint.format != "torch":
        raise ArgumentError(
            f"names={os.fspath(given)!r}: safetensors keeps no order; {_HOW_TO_NAME}"
        )
    model = open_checkpoint(path)
    return _ModelNames([one for one in model.tensors if _may_be_parameter(one, model)], model)


_HOW_TO_NAME: Final = (
    "pass names: a .txt file with those of model.named_parameters() in order, one on each line, or "
    "a list of them"
)


def _arrange_tensors(
    source: StoredAverage, target: _Target, names: _ModelNames | None
) -> tuple[StoredAverage, list[str]]:
    """Rename and order tensors for the target layout; also return what it leaves out."""
    found, wanted = source.checkpoint, target.layout
    keys = list(found.tensors)
    if source.names == "full" or (source.names, wanted.stores) == ("places", "places"):
        new = keys
    elif names is None:
        raise ArgumentError(
            f"{source.path} ({source.library}) has no names of the model, which {target.library} "
            f"needs; {_HOW_TO_NAME}"
        )
    elif source.names == "places":
        new = _names_of_list(source, names)
    else:
        dots = {name.replace(".", ""): name for name in names.names}
        missing = [name for name in keys if name not in dots]
        if missing:
            raise CheckpointError(f"none of the names is {missing[0]!r} when its dots are removed")
        new = [dots[name] for name in keys]
    if len(set(new)) < len(new):
        twice = next(name for name in new if new.count(name) > 1)
        raise CheckpointError(f"names: {twice!r} is there twice; each tensor needs its own name")
    source = replace(
        source, checkpoint=_select_and_rename(found, dict(zip(new, keys, strict=True)))
    )
    if source.names != "full" and names is not None:  # it held parameters only
        source = replace(source, parameters=[name for name in names.names if name in {*new}])
    if wanted.stores == "full":
        return source, []
    kept = new if source.names == "places" else _parameters(source, names, target)
    left = [name for name in new if name not in set(kept)]
    lost = [f"tensors that are not parameters: {_join_names(left)}"] if left else []
    by_place = wanted.stores == "places"
    of_places = {str(i) if by_place else name: name for i, name in enumerate(kept)}
    return replace(source, checkpoint=_select_and_rename(source.checkpoint, of_places)), lost


def _names_of_list(source: StoredAverage, names: _ModelNames) -> list[str]:
    """Return the names of the tensors of a list; raise a CheckpointError if they do not fit."""
    stored = list(source.checkpoint.tensors.values())
    if len(names.names) != len(stored) and names.state is None:
        raise CheckpointError(
            f"{len(names.names)} names for the {len(stored)} tensors of {source.path}"
        )
    if names.state is not None:
        shapes = [names.state.tensors[name].shape for name in names.names]
        if shapes != [one.shape for one in stored]:
            raise CheckpointError(
                f"{names.state.path} does not tell parameters from buffers: it has "
                f"{len(shapes)} tensors that may be the {len(stored)} of {source.path}, and the "
                f"shapes differ; {_HOW_TO_NAME}"
            )
    return names.names


def _parameters(source: StoredAverage, names: _ModelNames | None, target: _Target) -> list[str]:
    """Return the names of the parameters in the model's order."""
    given, wanted = names is not None and names.state is None, target.layout
    if names is not None and given:
        chosen = names.names
    elif source.parameters is not None:
        chosen = source.parameters
    else:
        unclear = source.path if names is None or names.state is None else names.state.path
        raise ArgumentError(
            f"{target.library} stores the parameters alone"
            + (", as a list in their order" if wanted.stores == "places" else "")
            + f", and {unclear} does not tell them from buffers; {_HOW_TO_NAME}"
        )
    missing = [f"{name!r} is missing" for name in chosen if name not in source.checkpoint.tensors]
    if missing and (given or wanted.stores == "places"):
        raise CheckpointError(
            f"{target.library} stores all parameters of the model, and {source.path} lacks\n"
            + format_problems(missing)
            + "\nBuild the average with frozen='copy', or pass names without these if the "
            "library gets only the others."
        )
    return [name for name in chosen if name in source.checkpoint.tensors]


def _join_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _select_and_rename(found: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint with only the tensors in ``names``, which maps new names to old ones."""
    return replace(
        found,
        tensors={new: found.tensors[old] for new, old in names.items()},
        places={new: found.places[old] for new, old in names.items()},
        layout={"model.safetensors": list(names)} if len(found.layout) == 1 else found.layout,
    )


# -- writing ---------------------------------------------------------------------------------------


class _Target(NamedTuple):
    """A library, what its layout stores, and the function that writes an average in it."""

    library: str
    layout: Layout
    write: Callable[[StoredAverage, Path], None]


@cache
def _targets() -> dict[str, _Target]:
    """Return the layouts that can be written, by library."""
    own = [_Target("fastema", _OURS, _write_ours), _Target("safetensors", _ALONE, _write_weights)]
    others = [
        _Target(library, one, partial(_write_torch, library, one))
        for library, layouts in known_layouts().items()
        for one in layouts
        if one.write is not None
    ]
    return {one.library: one for one in (*own, *others)}


_ALONE: Final = Layout("averaged weights", with_keys(), lambda _, state: StoredContents(state))
_OURS: Final = _ALONE._replace(counts=True, keeps=lambda schedule: True)


def writable_libraries() -> tuple[str, ...]:
    """Return the libraries whose layouts :func:`convert` can write."""
    return tuple(_targets())


def _write_torch(library: str, layout: Layout, source: StoredAverage, out: Path) -> None:
    torch = import_torch(f"convert(to={library!r})")
    assert layout.write is not None
    parts = [source.checkpoint, source.weights if layout.weights else None]
    tensors = [{} if one is None else read_tensors(one, torch.empty(0)) for one in parts]
    made = layout.write(source, *tensors)
    with atomic_write_path(out) as unfinished, open(unfinished, "xb") as opened:
        try:
            torch.save(made, opened)
        except RuntimeError as error:  # torch.save raises this for every operating system error
            raise StorageError(f"cannot write {out}: {error}") from error


def _write_ours(source: StoredAverage, out: Path) -> None:
    schedule = source.schedule
    if schedule is None:
        raise ArgumentError(
            f"{source.path} ({source.library}) does not record a schedule: pass decay, or "
            "build an average with the schedule that you want and use load_into(ema, path)"
        )
    rule = schedule.rules[0]
    if isinstance(rule, Window):
        raise ArgumentError(
            f"{source.path}: a windowed mean can continue only from its own file, which holds the "
            "weights of its window"
        )
    kind = next((name for known, name in _KINDS.items() if isinstance(rule, known)), "EMA")
    kind = source.options.get("kind", kind) if source.library == "fastema" else kind
    own = source.options if source.library == "fastema" else {}
    counters = {"num_updates": source.num_updates or 0}
    counters |= {name: own.get(name, 0) for name in ("num_skipped", "seed")}
    logs = own.get(LOG_DECAYS) or schedule.log_decays(counters["num_updates"])
    like = None
    with suppress(ArgumentError):  # NumPy alone has no bf16
        like = import_torch(f"convert({source.path})").empty(0)
    tensors = {"shadow": [read_tensors(drop_tied_names(source.checkpoint), like)]}
    rounding = source.options.get("rounding", "stochastic")
    write_tensors(out, pack(kind, counters, schedule, logs, rounding, tensors, source.parameters))


_KINDS: Final[dict[type[Rule], str]] = {CumulativeMean: "SWA", Power: "PowerEMA"}
"""Rule to the name of the class of its averages, for rules whose class is not EMA."""


def _write_weights(source: StoredAverage, out: Path) -> None:
    averaged = f"{source.library}: {source.path.name}" if source.library != "model" else ""
    copy(drop_tied_names(source.checkpoint), out, averaged)
