"""Replacement of a peer's classes with fastema's, for scripts that import the peer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final, NamedTuple

from fastema.compat.signatures import compare_interfaces
from fastema.engine.interrupts import defer_signals
from fastema.engine.locks import rlock
from fastema.errors import ArgumentError, PeerError, format_problems

__all__ = ["Installation", "install", "installed", "uninstall"]


_FUNCTIONS: Final = (
    *("get_ema_multi_avg_fn", "get_swa_multi_avg_fn", "get_ema_avg_fn", "get_swa_avg_fn"),
    "update_bn",
)

_LIGHTNING: Final = ("WeightAveraging", "EMAWeightAveraging")

_AVERAGE: Final = ("ExponentialMovingAverage",)

_KNOWN: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "diffusers": {"diffusers.training_utils": ("EMAModel",)},
    "ema_pytorch": {
        "ema_pytorch.ema_pytorch": ("EMA",),
        "ema_pytorch.ema_pytree_pytorch": ("EMAPytree",),
        "ema_pytorch.post_hoc_ema": ("KarrasEMA", "PostHocEMA"),
    },
    "keras": {"keras.src.callbacks.swap_ema_weights": ("SwapEMAWeights",)},
    "lightning": {
        "lightning.pytorch.callbacks.weight_averaging": _LIGHTNING,
        "pytorch_lightning.callbacks.weight_averaging": _LIGHTNING,
    },
    "swa_utils": {"torch.optim.swa_utils": ("AveragedModel", *_FUNCTIONS)},
    "tensorflow": {"tensorflow.python.training.moving_averages": _AVERAGE},
    "timm": {"timm.utils.model_ema": ("ModelEma", "ModelEmaV2", "ModelEmaV3")},
    "torch_ema": {"torch_ema.ema": _AVERAGE},
}
"""Per peer, the modules that define or export the replaced names, and these names."""


class _Binding(NamedTuple):
    """A name in a module, with the peer's object and ours."""

    module: ModuleType
    name: str
    theirs: Any
    ours: Any


_lock = rlock()
_installed: dict[str, list[_Binding]] = {}


class Installation:
    """Peers whose classes are replaced until a ``with`` block ends, or until :func:`uninstall`.

    ``peers`` names the peers that this call replaced; peers that were replaced before stay so.
    """

    def __init__(self, places: dict[str, list[_Binding]]) -> None:
        self.peers = tuple(places)
        self._places = places

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            for peer, places in self._places.items():
                if _installed.get(peer) is places:  # skip one that was installed again since
                    uninstall(peer)

    def __repr__(self) -> str:
        return f"Installation({', '.join(self.peers)})"


def install(*peers: str) -> Installation:
    """Replace peers' classes with fastema's, so that an existing script uses the kernels unchanged.

    The names are replaced where they are defined and in every module that has imported them, so the
    script may import them before or after this call. Averages are updated after the same steps as
    the peer's, with the same weights. Averages that already exist keep the peer's class: their
    states can be saved, but they can be pickled as whole objects only after the peer's classes are
    restored. The end of a ``with`` block restores these; without one, call :func:`uninstall`.

    Parameters
    ----------
    *peers : str
        ``"diffusers"``, ``"ema_pytorch"``, ``"keras"``, ``"lightning"``, ``"swa_utils"`` (of
        :mod:`torch.optim`), ``"tensorflow"``, ``"timm"``, ``"torch_ema"``: docs/drop-in.md lists
        their classes. A peer that is already replaced stays so.

    Raises
    ------
    ArgumentError
        For no name, or an unknown one.
    PeerError
        If a peer is missing, or its interface differs from the known one: the error names every
        difference. No peer is replaced then.

    Examples
    --------
    >>> import fastema, torch
    >>> with fastema.compat.install("swa_utils"):
    ...     averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    >>> type(averaged).__module__
    'fastema.compat.swa_utils.classes'
    """
    unknown = [peer for peer in peers if not (isinstance(peer, str) and peer in _KNOWN)]
    if unknown or not peers:
        given = ", ".join(map(repr, unknown)) if unknown else "no name"
        raise ArgumentError(
            f"install: got {given}; known are {', '.join(sorted(_KNOWN))}. For other libraries, "
            "docs/drop-in.md says what to write instead"
        )
    with _lock:
        new = tuple(dict.fromkeys(peer for peer in peers if peer not in _installed))
        pairs = {peer: _check_peer(peer) for peer in new}
        places = {peer: [p for pair in pairs[peer] for p in _find_bindings(*pair)] for peer in new}
        with defer_signals():
            for found in places.values():
                for place in found:
                    _members(place.module)[place.name] = place.ours
            _installed.update(places)
        return Installation(places)


def uninstall(*peers: str) -> None:
    """Restore peers' classes, by default all, wherever :func:`install` replaced them.

    Names that a module has imported since, and averages that were built, keep fastema's classes.
    Raise an ArgumentError for a peer that is not installed; nothing is changed then.
    """
    with _lock:
        strange = [peer for peer in peers if peer not in _installed]
        if strange:
            now = ", ".join(_installed) or "none"
            raise ArgumentError(
                f"uninstall: {', '.join(map(repr, strange))} not installed; installed: {now}"
            )
        for peer in dict.fromkeys(peers or _installed):
            for place in _installed.pop(peer):
                # Leave a replacement that somebody else installed.
                members = _members(place.module)
                if members.get(place.name) is place.ours:
                    members[place.name] = place.theirs


def installed() -> tuple[str, ...]:
    """Return the peers whose classes are replaced now."""
    with _lock:
        return tuple(_installed)


def _check_peer(name: str) -> list[tuple[Any, Any]]:
    """Return (theirs, ours) for each name of a peer; raise a PeerError if its interface differs."""
    known = _KNOWN[name]
    present = [home for home in known if _is_installed(home.partition(".")[0])]
    if not present:
        raise PeerError(f"{_distribution(next(iter(known)))} is not installed: nothing to replace")
    pairs = []
    for home in present:
        problems, found = _compare_module(home, known[home], f"fastema.compat.{name}")
        if problems:
            distribution = _distribution(home)
            raise PeerError(
                f"{distribution} {_version(distribution)} has an interface that fastema does not "
                f"know:\n{format_problems(problems)}\nImport from fastema.compat.{name} instead, "
                "or use a version that it knows."
            )
        pairs += found
    return pairs


def _distribution(home: str) -> str:
    return home.partition(".")[0].replace("_", "-")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # the module has no __spec__
        return package in sys.modules


def _compare_module(
    home: str, names: tuple[str, ...], module: str
) -> tuple[list[str], list[tuple[Any, Any]]]:
    try:
        theirs = import_module(home)
    except Exception as error:  # a broken package may raise anything
        return [f"{home} cannot be imported: {type(error).__name__}: {error}"], []
    ours = import_module(module)
    missing = [f"{home}.{one} is missing" for one in names if not hasattr(theirs, one)]
    if missing:
        return missing, []
    pairs = [(getattr(theirs, one), getattr(ours, one)) for one in names]
    return [problem for pair in pairs for problem in compare_interfaces(*pair)], pairs


def _find_bindings(theirs: Any, ours: Any) -> Iterator[_Binding]:
    """Yield every name that a module outside fastema binds to ``theirs``."""
    for module in list(sys.modules.values()):
        # Read __dict__ without attribute access, which would import lazy modules.
        members = _members(module)
        name = members.get("__name__")
        if isinstance(name, str) and name.partition(".")[0] == "fastema":
            continue  # fastema builds on some of the peers' classes
        for name, value in list(members.items()):
            if value is theirs:
                yield _Binding(module, name, theirs, ours)


def _members(module: Any) -> dict[str, Any]:
    if not isinstance(module, ModuleType):
        return {}
    members: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return members
