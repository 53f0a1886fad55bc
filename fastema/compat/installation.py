"""Puts our classes in place of a peer's, for scripts that import the peer's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final, Literal, NamedTuple, get_args

from fastema.compat.signatures import differences
from fastema.engine.interrupts import defer_signals
from fastema.engine.locks import rlock
from fastema.errors import ArgumentError, PeerError, listed

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
"""The places where each peer's names are replaced: definitions and imports."""


class _Replaced(NamedTuple):
    """A name in a module, and what it was bound to."""

    module: ModuleType
    name: str
    theirs: Any
    ours: Any


Horizon = Literal["peer", "corrected"]

# Peers whose ``update_every`` lengthens the horizon: see fastema.compat.peer_horizon.
_DIFFER: Final = ("ema_pytorch", "lightning")

_lock = rlock()
_installed: dict[str, list[_Replaced]] = {}
_horizons: dict[str, Horizon] = {}


class Installation:
    """Peers whose classes are replaced until the end of a ``with`` block, or for good.

    ``peers`` are those that the call replaced; what was replaced before stays so.
    """

    def __init__(self, places: dict[str, list[_Replaced]]) -> None:
        self.peers = tuple(places)
        self._places = places

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            for peer, places in self._places.items():
                if _installed.get(peer) is places:  # not one that was installed again meanwhile
                    uninstall(peer)

    def __repr__(self) -> str:
        return f"Installation({', '.join(self.peers)})"


def install(*peers: str, horizon: Horizon = "peer") -> Installation:
    """Put our classes in place of a peer's: an existing script gains the kernels unchanged.

    Their names are replaced where they are defined and in every module that has imported them, so
    it does not matter whether the script imports them before or after. They update after the same
    steps as the peer's, with the same weights. Averages that exist already stay what they are;
    their states can be saved, but pickled as whole objects only once the peer's classes are back.
    The result gives these back at the end of a ``with`` block, :func:`uninstall` without one.

    Parameters
    ----------
    *peers : str
        ``"diffusers"``, ``"ema_pytorch"``, ``"keras"``, ``"lightning"``, ``"swa_utils"`` (of
        :mod:`torch.optim`), ``"tensorflow"``, ``"timm"``, ``"torch_ema"``: docs/drop-in.md lists
        their classes. One that is replaced already is left so.
    horizon : {"peer", "corrected"}
        Over how many steps ``update_every`` (ema_pytorch) and ``update_every_n_steps`` (Lightning)
        average. ``"peer"`` (default): as there, times as many as it says. ``"corrected"``: as many
        as with an update after every step, as the classes of :mod:`fastema.compat` do.

    Raises
    ------
    ArgumentError
        For no name, an unknown name or horizon, or another horizon than an installed peer has.
    PeerError
        If a peer is missing, or its interface differs from the known one: every difference is
        named. Nothing is replaced then, of any peer.

    Examples
    --------
    >>> import fastema, torch
    >>> with fastema.compat.install("swa_utils"):
    ...     averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    >>> type(averaged).__module__
    'fastema.compat.swa_utils'
    """
    unknown = [peer for peer in peers if not (isinstance(peer, str) and peer in _KNOWN)]
    if unknown or not peers:
        given = ", ".join(map(repr, unknown)) if unknown else "no name"
        raise ArgumentError(f"install: got {given}; known are {', '.join(sorted(_KNOWN))}")
    if horizon not in get_args(Horizon):
        raise ArgumentError(
            f"install: horizon={horizon!r}: expected one of {', '.join(get_args(Horizon))}"
        )
    with _lock:
        for peer in peers:
            if peer in _DIFFER and _horizons.get(peer, horizon) != horizon:
                raise ArgumentError(
                    f"install: {peer} is installed with horizon={_horizons[peer]!r}: uninstall it "
                    f"before it is installed with horizon={horizon!r}"
                )
        new = tuple(dict.fromkeys(peer for peer in peers if peer not in _installed))
        pairs = {peer: _checked(peer, horizon) for peer in new}
        places = {peer: [p for pair in pairs[peer] for p in _places(*pair)] for peer in new}
        with defer_signals():
            for found in places.values():
                for place in found:
                    _members(place.module)[place.name] = place.ours
            _installed.update(places)
            _horizons.update(dict.fromkeys(places, horizon))
        return Installation(places)


def uninstall(*peers: str) -> None:
    """Give peers' classes back, by default all, wherever :func:`install` replaced them.

    What a module has imported in the meantime it keeps, and so do averages that were built. An
    ArgumentError for one that is not installed; nothing was changed then.
    """
    with _lock:
        strange = [peer for peer in peers if peer not in _installed]
        if strange:
            now = ", ".join(_installed) or "none"
            raise ArgumentError(
                f"uninstall: {', '.join(map(repr, strange))} not installed; installed: {now}"
            )
        for peer in dict.fromkeys(peers or _installed):
            _horizons.pop(peer)
            for place in _installed.pop(peer):
                # Whoever has put something else there meant it.
                members = _members(place.module)
                if members.get(place.name) is place.ours:
                    members[place.name] = place.theirs


def installed() -> tuple[str, ...]:
    """The peers whose classes are replaced now."""
    with _lock:
        return tuple(_installed)


def _checked(name: str, horizon: Horizon) -> list[tuple[Any, Any]]:
    """Theirs and ours of every name, if the peer's interface is the known one."""
    known = _KNOWN[name]
    present = [home for home in known if _is_installed(home.partition(".")[0])]
    if not present:
        raise PeerError(f"{_distribution(next(iter(known)))} is not installed: nothing to replace")
    inside = "peer_horizon." if horizon == "peer" and name in _DIFFER else ""
    pairs = []
    for home in present:
        problems, found = _compared(home, known[home], f"fastema.compat.{inside}{name}")
        if problems:
            distribution = _distribution(home)
            raise PeerError(
                f"{distribution} {_version(distribution)} has an interface that fastema does not "
                f"know:\n{listed(problems)}\nImport from fastema.compat.{name} instead, or use a "
                "version that it knows."
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
    except ValueError:  # of a module made by hand
        return package in sys.modules


def _compared(
    home: str, names: tuple[str, ...], module: str
) -> tuple[list[str], list[tuple[Any, Any]]]:
    try:
        theirs = import_module(home)
    except Exception as error:  # whatever goes wrong in a package that is broken
        return [f"{home} cannot be imported: {type(error).__name__}: {error}"], []
    ours = import_module(module)
    missing = [f"{home}.{one} is missing" for one in names if not hasattr(theirs, one)]
    if missing:
        return missing, []
    pairs = [(getattr(theirs, one), getattr(ours, one)) for one in names]
    return [problem for pair in pairs for problem in differences(*pair)], pairs


def _places(theirs: Any, ours: Any) -> Iterator[_Replaced]:
    """Every name of a module that is bound to theirs; ours builds on some of them."""
    for module in list(sys.modules.values()):
        # Modules that are imported when they are looked at are not to be looked at.
        members = _members(module)
        name = members.get("__name__")
        if isinstance(name, str) and name.partition(".")[0] == "fastema":
            continue
        for name, value in list(members.items()):
            if value is theirs:
                yield _Replaced(module, name, theirs, ours)


def _members(module: Any) -> dict[str, Any]:
    if not isinstance(module, ModuleType):
        return {}
    members: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return members
