"""Ours in the place of a peer's classes, for scripts that import the peer's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any, Final, NamedTuple

from fastema.compat.interface import differences
from fastema.engine.locks import rlock
from fastema.errors import ArgumentError, PeerError, listed

__all__ = ["Installation", "install", "installed", "uninstall"]


class _Peer(NamedTuple):
    """A package whose names are replaced.

    Attributes
    ----------
    distribution : str
        What its version is asked by.
    home : str
        The module that defines the names.
    names : tuple of str
        What is replaced: there, and wherever else it was imported to.
    """

    distribution: str
    home: str
    names: tuple[str, ...]


_FUNCTIONS: Final = (
    *("get_ema_multi_avg_fn", "get_swa_multi_avg_fn", "get_ema_avg_fn", "get_swa_avg_fn"),
    "update_bn",
)

_LIGHTNING: Final = ("WeightAveraging", "EMAWeightAveraging")

_KNOWN: Final = {
    "diffusers": [_Peer("diffusers", "diffusers.training_utils", ("EMAModel",))],
    "ema_pytorch": [
        _Peer("ema-pytorch", "ema_pytorch.ema_pytorch", ("EMA",)),
        _Peer("ema-pytorch", "ema_pytorch.ema_pytree_pytorch", ("EMAPytree",)),
        _Peer("ema-pytorch", "ema_pytorch.post_hoc_ema", ("KarrasEMA", "PostHocEMA")),
    ],
    "keras": [_Peer("keras", "keras.src.callbacks.swap_ema_weights", ("SwapEMAWeights",))],
    "lightning": [
        _Peer("lightning", "lightning.pytorch.callbacks.weight_averaging", _LIGHTNING),
        _Peer("pytorch-lightning", "pytorch_lightning.callbacks.weight_averaging", _LIGHTNING),
    ],
    "swa_utils": [_Peer("torch", "torch.optim.swa_utils", ("AveragedModel", *_FUNCTIONS))],
    "tensorflow": [
        _Peer(
            "tensorflow",
            "tensorflow.python.training.moving_averages",
            ("ExponentialMovingAverage",),
        )
    ],
    "timm": [_Peer("timm", "timm.utils.model_ema", ("ModelEma", "ModelEmaV2", "ModelEmaV3"))],
    "torch_ema": [_Peer("torch-ema", "torch_ema.ema", ("ExponentialMovingAverage",))],
}


class _Replaced(NamedTuple):
    """A name in a module, and what it was bound to."""

    module: ModuleType
    name: str
    theirs: Any
    ours: Any


_lock = rlock()
_installed: dict[str, list[_Replaced]] = {}


class Installation:
    """Peers whose classes are replaced until the end of a ``with`` block, or for good.

    Attributes
    ----------
    peers : tuple of str
        Those that this call replaced; what was replaced before is left when the block ends.
    """

    def __init__(self, peers: tuple[str, ...]) -> None:
        self.peers = peers

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        uninstall(*(peer for peer in self.peers if peer in _installed))

    def __repr__(self) -> str:
        return f"Installation({', '.join(self.peers)})"


def install(*peers: str) -> Installation:
    """Put our classes in the place of a peer's: an existing script gains the kernels unchanged.

    Their names are replaced where they are defined and in every module that has imported them, so
    it does not matter whether the script imports them before or after. Averages that exist already
    stay what they are.

    Parameters
    ----------
    *peers : str
        ``"diffusers"`` (``EMAModel``), ``"ema_pytorch"`` (``EMA``, ``EMAPytree``, ``KarrasEMA``,
        ``PostHocEMA``), ``"keras"`` (``SwapEMAWeights``), ``"lightning"`` (``WeightAveraging``,
        ``EMAWeightAveraging``),
        ``"swa_utils"`` (``AveragedModel``, ``get_ema_multi_avg_fn`` and the like, ``update_bn`` of
        :mod:`torch.optim.swa_utils`), ``"tensorflow"`` (``tf.train.ExponentialMovingAverage``),
        ``"timm"`` (``ModelEma``, ``ModelEmaV2``, ``ModelEmaV3``), ``"torch_ema"``
        (``ExponentialMovingAverage``). One that is replaced already is left so.

    Returns
    -------
    Installation
        A context manager, for those who want the peer's classes back: see :func:`uninstall`.

    Raises
    ------
    ArgumentError
        For an unknown name, or none.
    PeerError
        If a peer is missing, or of a version whose interface is not the one that is known here:
        every difference is named. Nothing is replaced then, of any peer.

    Examples
    --------
    >>> import fastema, torch
    >>> with fastema.compat.install("swa_utils"):
    ...     averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    >>> type(averaged).__module__
    'fastema.compat.swa_utils'
    """
    unknown = [peer for peer in peers if peer not in _KNOWN]
    if unknown or not peers:
        given = ", ".join(map(repr, unknown)) if unknown else "no name"
        raise ArgumentError(f"install: got {given}; known are {', '.join(sorted(_KNOWN))}")
    with _lock:
        new = tuple(dict.fromkeys(peer for peer in peers if peer not in _installed))
        found = {peer: _checked(peer) for peer in new}
        for peer, pairs in found.items():
            _installed[peer] = [place for pair in pairs for place in _places(*pair)]
            for place in _installed[peer]:
                setattr(place.module, place.name, place.ours)
        return Installation(new)


def uninstall(*peers: str) -> None:
    """Give a peer's classes back, wherever :func:`install` replaced them.

    What a module has imported in the meantime it keeps, and so do averages that were built.

    Parameters
    ----------
    *peers : str
        By default all that are installed.

    Raises
    ------
    ArgumentError
        For one that is not installed; nothing was changed.
    """
    with _lock:
        strange = [peer for peer in peers if peer not in _installed]
        if strange:
            now = ", ".join(_installed) or "none"
            raise ArgumentError(
                f"uninstall: {', '.join(map(repr, strange))} not installed; installed: {now}"
            )
        for peer in peers or tuple(_installed):
            for place in _installed.pop(peer):
                # Whoever has put something else there meant it.
                if vars(place.module).get(place.name) is place.ours:
                    setattr(place.module, place.name, place.theirs)


def installed() -> tuple[str, ...]:
    """The peers whose classes are replaced now."""
    with _lock:
        return tuple(_installed)


def _checked(name: str) -> list[tuple[Any, Any]]:
    """Theirs and ours of every name, if the peer's interface is the known one."""
    present = [peer for peer in _KNOWN[name] if find_spec(peer.home.partition(".")[0])]
    if not present:
        raise PeerError(f"{_KNOWN[name][0].distribution} is not installed: nothing to replace")
    pairs = []
    for peer in present:
        problems, found = _compared(peer, name)
        if problems:
            raise PeerError(
                f"{peer.distribution} {_version(peer.distribution)} has an interface that fastema "
                f"does not know:\n{listed(problems)}\nImport from fastema.compat.{name} instead, "
                "or use a version that it knows."
            )
        pairs += found
    return pairs


def _compared(peer: _Peer, name: str) -> tuple[list[str], list[tuple[Any, Any]]]:
    try:
        home = import_module(peer.home)
    except ImportError as error:
        return [f"{peer.home} cannot be imported: {error}"], []
    ours = import_module(f"fastema.compat.{name}")
    missing = [f"{peer.home}.{one} is missing" for one in peer.names if not hasattr(home, one)]
    if missing:
        return missing, []
    pairs = [(getattr(home, one), getattr(ours, one)) for one in peer.names]
    return [problem for pair in pairs for problem in differences(*pair)], pairs


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _places(theirs: Any, ours: Any) -> Iterator[_Replaced]:
    """Every name of a module that is bound to theirs; ours builds on some of them."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] == "fastema":
            continue
        for name, value in list(vars(module).items()):
            if value is theirs:
                yield _Replaced(module, name, theirs, ours)
