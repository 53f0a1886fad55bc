"""Batch normalization statistics for averaged weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fastema.errors import ArgumentError, BridgeError

if TYPE_CHECKING:  # fastema.update_bn can be imported without PyTorch
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["update_bn"]

Forward: TypeAlias = Callable[[Any, Any], object]
SavedBuffers: TypeAlias = "tuple[_BatchNorm, dict[str, torch.Tensor]]"

_MODEL_ATTRIBUTES: Final = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
"""Attributes in which wrappers hold the model: data parallel, averaged, compiled, sharded, ..."""


def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    progress: bool = False,
    forward: Forward | None = None,
) -> None:
    """Recompute the running statistics of batch normalization with the model's current weights.

    Over batches ``b = 1 ... B``, the inputs of each layer give ``running_mean = sum(mean_b) / B``
    and ``running_var = sum(var_b) / B``, where ``var_b`` is the unbiased variance within a batch.
    These are the numbers of :func:`torch.optim.swa_utils.update_bn`. Averaged weights produce other
    activations than trained weights, so call this function before you evaluate or save averaged
    weights.

    Parameters
    ----------
    loader : iterable
        Batches of training inputs, read once. The input is the first element of a list or tuple. A
        mapping is passed as ``model(**input)``, without keys that ``model.forward`` does not take.
    model : torch.nn.Module
        A model with ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` or ``SyncBatchNorm`` layers. If none
        of them tracks statistics, nothing is done and the loader is not read.
    device : torch.device, str or int, optional
        Device to which inputs are moved: tensors, other objects with a method ``to``, and their
        nested lists, tuples and mappings. By default inputs are not moved.
    progress : bool
        Show a progress bar on standard error (default False); needs the package rich.
    forward : callable, optional
        ``forward(model, batch)``, called with each whole batch instead of the model.

    Raises
    ------
    ArgumentError
        For an empty loader, a mapping without a key that ``model.forward`` takes, or a missing
        rich.
    BridgeError
        If a layer is lazy and has no shape yet.

    Notes
    -----
    The model runs in training mode without gradients; momenta and modes are restored afterward. If
    the run raises, the old statistics are restored too, bit for bit. A layer that sees no batch
    keeps its statistics. All batches have the same weight, regardless of their size.

    Inside ``with ema.swapped():`` the new statistics belong to the average, and the raw weights get
    their own back. With ``buffers="copy"``, the next ``update()`` copies the statistics of the raw
    weights again. With ``buffers="skip"``, the average has no statistics, and the model keeps the
    new ones.

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
            "a lazy batch normalization has no shape yet; run the model once before update_bn()"
        )
    run = forward or _make_caller(model)
    empty = True
    with (
        torch.no_grad(),
        _with_progress(loader, progress) as batches,
        _recompute_statistics(model, layers),
    ):
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
def _recompute_statistics(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Make the layers average over all batches of the block; undo everything if it raises."""
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
            layer.momentum = None  # PyTorch then computes a cumulative average
        yield
        # Some layers may not have run, or the model's train() may keep them frozen.
        _restore_buffers([state for state in before if not state[0].num_batches_tracked])
    except BaseException:
        _restore_buffers(before)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


def _restore_buffers(states: list[SavedBuffers]) -> None:
    """Copy saved buffers into their layers, in place, since an average may share the memory."""
    for layer, buffers in states:
        for name, kept in buffers.items():
            layer.get_buffer(name).copy_(kept)


def _to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Return a batch with all of its nested tensors on a device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [_to_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _make_caller(model: nn.Module) -> Forward:
    """Return a function that calls the model with an input, or with a mapping as keywords."""
    names = _find_keywords(model)

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


def _find_keywords(model: nn.Module) -> frozenset[str] | None:
    """Return the keyword arguments that a possibly wrapped model takes; None if it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return frozenset(one.name for one in parameters if one.kind in named)
    # Wrappers take (*args, **kwargs), and pass all of them to their only child.
    children = list(model.named_children())
    if kinds[0] is inspect.Parameter.VAR_POSITIONAL and len(children) == 1:
        name, child = children[0]
        if name in _MODEL_ATTRIBUTES:
            return _find_keywords(child)
    return None


@contextmanager
def _with_progress(loader: Iterable[Any], progress: bool) -> Iterator[Iterable[Any]]:
    """Yield the loader, with a progress bar if requested."""
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
