"""Statistics of batch normalisation for averaged weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fastema.errors import ArgumentError, BridgeError

if TYPE_CHECKING:  # where PyTorch is not installed, fastema.update_bn is there all the same
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["update_bn"]

Forward: TypeAlias = Callable[[Any, Any], object]
State: TypeAlias = "tuple[_BatchNorm, dict[str, torch.Tensor]]"

_INSIDE: Final = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which wrappers hold the model: data parallel, averaged, compiled, sharded, ..."""


def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    progress: bool = False,
    forward: Forward | None = None,
) -> None:
    """Recompute the running statistics of batch normalisation with the weights the model holds now.

    Over batches ``b = 1 ... B`` each layer gets ``running_mean = sum(mean_b) / B`` and
    ``running_var = sum(var_b) / B`` of its inputs, ``var_b`` being the unbiased variance within a
    batch: the same numbers as :func:`torch.optim.swa_utils.update_bn`. Averaged weights give other
    activations than the weights that were trained, so call it before averaged weights are evaluated
    or saved.

    Parameters
    ----------
    loader : iterable
        Batches of training inputs, read once. Of a list or tuple the first element is the input. A
        mapping is passed as ``model(**input)``, without the names that ``model.forward`` lacks.
    model : torch.nn.Module
        With layers of ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` or ``SyncBatchNorm``. If none of
        them tracks statistics, nothing is done and the loader is not read.
    device : torch.device, str or int, optional
        Where inputs are moved: tensors, other objects with a method ``to``, and those in nested
        lists, tuples and mappings. By default they stay where they are.
    progress : bool
        Show a progress bar on standard error; needs the package rich.
    forward : callable, optional
        ``forward(model, batch)``, called with each whole batch instead.

    Raises
    ------
    ArgumentError
        For an empty loader, a mapping without a name that ``model.forward`` takes, a missing rich.
    BridgeError
        If a layer is lazy and has no shape yet.

    Notes
    -----
    The pass is made in training mode and without gradients; momenta and modes come back. If it
    raises, so do the old statistics, bit for bit. A layer that saw no batch keeps its own. All
    batches count the same, whatever their size.

    Inside ``with ema.swapped():`` the new statistics belong to the average, and the raw weights get
    theirs back. With ``buffers="copy"`` the next ``update()`` takes those of the raw weights again;
    with ``buffers="skip"`` there are none in the average, and the model keeps the new ones.

    Examples
    --------
    >>> import fastema, torch
    >>> from fastema.torch import update_bn
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> loader = [(torch.randn(8, 3), torch.randn(8, 4)) for _ in range(5)]
    >>> ema = fastema.EMA(model)
    >>> with ema.swapped():
    ...     update_bn(loader, model)
    >>> int(ema.shadow["1.num_batches_tracked"]), int(model[1].num_batches_tracked)
    (5, 0)

    References
    ----------
    P. Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018,
    https://arxiv.org/abs/1803.05407
    """
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
    ]
    if not layers:
        return
    if any(nn.parameter.is_lazy(buffer) for layer in layers for buffer in layer.buffers()):
        raise BridgeError(
            "a lazy batch normalisation has no shape yet; run the model once before update_bn()"
        )
    run = forward or _caller(model)
    empty = True
    with torch.no_grad(), _with_progress(loader, progress) as batches, _recomputed(model, layers):
        for batch in batches:
            empty = False
            if forward is None and isinstance(batch, list | tuple):
                batch = batch[0]
            run(model, batch if device is None else _to_device(batch, device))
        if empty:
            raise ArgumentError(
                "loader gave no batch to compute statistics from (a generator is empty after its "
                "first use); the old statistics are kept"
            )


@contextmanager
def _recomputed(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Let the layers average over all batches of a block; an error in it undoes everything."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    before = [
        (layer, {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)})
        for layer in layers
    ]
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's sign for a cumulative average
        yield
        # Part of a model may not run, or its train() may keep layers frozen.
        _restore_buffers([state for state in before if not state[0].num_batches_tracked])
    except BaseException:
        _restore_buffers(before)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


def _restore_buffers(states: list[State]) -> None:
    """Write kept buffers into their layers, in place: an average may share the memory."""
    for layer, buffers in states:
        for name, kept in buffers.items():
            layer.get_buffer(name).copy_(kept)


def _to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Return a batch, and all that it holds, on a device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [_to_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _caller(model: nn.Module) -> Forward:
    """Return a function that calls this model with an input."""
    names = _keywords(model)

    def call(model: nn.Module, given: Any) -> object:
        if not isinstance(given, Mapping):
            return model(given)
        taken = {key: value for key, value in given.items() if names is None or key in names}
        if not taken:
            raise ArgumentError(
                f"the model's forward takes {sorted(names or ())}, and a batch with the keys "
                f"{list(given)} has none of them; say how to call it, such as "
                "forward=lambda model, batch: model(batch['image'])"
            )
        return model(**taken)

    return call


def _keywords(model: nn.Module) -> frozenset[str] | None:
    """Return the keyword arguments that a model, or the model in a wrapper, takes; None for any."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return frozenset(one.name for one in parameters if one.kind in named)
    # Wrappers take (*args, **kwargs), and hand all of them to their one child.
    children = list(model.named_children())
    if kinds[0] is inspect.Parameter.VAR_POSITIONAL and len(children) == 1:
        name, child = children[0]
        if name in _INSIDE:
            return _keywords(child)
    return None


@contextmanager
def _with_progress(loader: Iterable[Any], progress: bool) -> Iterator[Iterable[Any]]:
    """Yield the loader, with a progress bar if asked for."""
    if not progress:
        yield loader
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        raise ArgumentError("progress=True needs the package rich: pip install rich") from None
    with Progress(console=Console(stderr=True)) as bar:
        yield bar.track(loader, description="BatchNorm statistics")
