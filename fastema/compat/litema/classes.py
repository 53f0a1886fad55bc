"""The classes and functions of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastema.bridges.names import strip_wrapper_prefixes
from fastema.bridges.torch_parts import refuse_zero3_model
from fastema.checkpoint.transfer import check_mapping, describe_unfit
from fastema.compat.averager import ModelAverager
from fastema.compat.lists import StoredWeights
from fastema.compat.mirrored import MirroredNumber
from fastema.compat.modules import NamedAverager
from fastema.compat.shares import check_fraction
from fastema.engine.interrupts import defer_signals
from fastema.errors import CheckpointError, LayoutError, format_problems

__all__ = ["LitEma", "ema_weights", "with_ema_weights"]

_COUNTERS: Final = ("decay", "num_updates")


def _remove_dots(names: Iterable[str]) -> dict[str, str]:
    """Map names to names without dots, as in checkpoints; raise a LayoutError if two collide."""
    found: dict[str, str] = {}
    taken = {name: f"the buffer {name!r}" for name in _COUNTERS}
    problems = []
    for name in names:
        short = found[name] = name.replace(".", "")
        if short in taken:
            problems.append(f"{name!r} becomes {short!r}, as does {taken[short]}")
        taken.setdefault(short, repr(name))
    if problems:
        raise LayoutError(
            "LitEma stores averages under names without dots, and these names would collide; "
            "rename the parameters, or use fastema.EMA:\n" + format_problems(problems)
        )
    return found


def _parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters by their names without wrappers' prefixes; tied ones by all their names."""
    return strip_wrapper_prefixes(dict(model.named_parameters(remove_duplicate=False)))


class LitEma(nn.Module):
    """Average of the trained parameters of a model, in buffers: the ``LitEma`` of SGM.

    Each call computes ``shadow += (1 - d) * (p - shadow)`` with ``d = decay``; if updates are
    counted, the n-th call has ``d = min(decay, (1 + n) / (10 + n))``.

    Parameters
    ----------
    model : torch.nn.Module
        Model whose parameters that require a gradient are averaged, in their dtypes and on their
        devices.
    decay : float
        Weight of the old average, in [0, 1], otherwise an ArgumentError. Default 0.9999.
    use_num_upates : bool
        Count updates and let the decay grow with their number (default). The spelling is the
        peer's.

    Attributes
    ----------
    decay, num_updates : Tensor
        float32 buffer, and int32 buffer, which is -1 if updates are not counted.
    m_name2s_name : dict of str to str
        Maps names of parameters to names of buffers, which have no dots. Names that collide without
        dots raise a LayoutError.
    collected_params : list of Tensor
        The copies that :meth:`store` keeps.

    Notes
    -----
    The interface and the checkpoints are those of ``sgm/modules/ema.py`` of Stability AI's
    generative-models and of ``ldm/modules/ema.py``. Differences beyond those in
    ``docs/drop-in.md``:

    - For a float32 average of bfloat16 parameters, build it, then call ``.float()``. Random bits
      are a function of the update's number, the name and the element. If updates are not counted,
      the number is that of calls since the average was built or loaded.
    - :meth:`store` after :meth:`copy_to`, and :meth:`restore` without stored weights or with fewer
      tensors, raise an error; the peer loses the weights, or does nothing.
    - A parameter that is frozen later is still averaged; in the peer that is an error.
    - The counters keep their dtypes when the module is cast. In the peer, a cast to 16 bits turns
      ``decay`` into 1.0.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> model_ema = LitEma(model, decay=0.999)
    >>> model_ema(model)                            # after each optimizer step
    >>> model_ema.store(model.parameters())
    >>> model_ema.copy_to(model)                    # evaluate here
    >>> model_ema.restore(model.parameters())
    >>> sorted(model_ema.state_dict())
    ['bias', 'decay', 'num_updates', 'weight']
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True
    ) -> None:
        super().__init__()
        check_fraction(decay, "decay")
        refuse_zero3_model(model)
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.m_name2s_name = _remove_dots(trained)
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        start = 0 if use_num_upates else -1
        self.register_buffer("num_updates", torch.tensor(start, dtype=torch.int))
        for name, parameter in trained.items():
            self.register_buffer(self.m_name2s_name[name], parameter.detach().clone())
        self.collected_params: list[Tensor] = []
        self._stored = StoredWeights("collected_params", nothing=[])
        self._calls = 0
        self._limit, self._count = MirroredNumber(), MirroredNumber()
        shorts = {id(one): self.m_name2s_name[name] for name, one in trained.items()}
        self._buffer_of = {
            name: shorts[id(one)]
            for name, one in _parameters_by_name(model).items()
            if id(one) in shorts
        }
        self._averager = NamedAverager(self._buffer_of)

    def _averages(self) -> dict[str, Tensor]:
        """Return the current averages by parameter name; ``.to()`` replaces the buffers."""
        buffers: Mapping[str, Any] = self._buffers
        return {name: buffers[short] for name, short in self._buffer_of.items()}

    def _apply(self, fn: Any, recurse: bool = True) -> LitEma:
        """Move or cast the averages; only move the counters, as 16 bits round 0.9999 to 1.0."""
        counters = {name: self.get_buffer(name) for name in _COUNTERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in counters.items():
            if self.get_buffer(name).dtype != before.dtype:
                self._buffers[name] = before.to(self.get_buffer(name).device)
        self._averager.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load, and drop references to buffers that loading may have replaced."""
        super()._load_from_state_dict(*args, **kwargs)
        self._averager.forget()

    def _call(self, model: nn.Module, call: Callable[[ModelAverager], None]) -> None:
        """Call ``call`` with the averager; raise an error that names tensors that do not match."""
        try:
            call(self._averager.of(self._averages()))
        except LayoutError:
            problems = self._find_mismatches(model) if isinstance(model, nn.Module) else []
            if not problems:
                raise
            raise LayoutError(
                "the averages do not match the model's trained parameters; freeze the parameters "
                "that were frozen when LitEma was built, or build a new LitEma:\n"
                + format_problems(problems)
            ) from None

    def _find_mismatches(self, model: nn.Module) -> list[str]:
        parameters, averages = _parameters_by_name(model), self._averages()
        problems = [
            f"{name!r} is trained in the model, but has no average"
            for name, one in parameters.items()
            if one.requires_grad and name not in averages
        ]
        for name, average in averages.items():
            if name not in parameters:
                problems.append(f"{name!r} has an average, but the model has no such parameter")
            elif (found := parameters[name].shape) != average.shape:
                shapes = list(found), list(average.shape)
                problems.append(f"{name!r} is {shapes[0]} in the model, its average {shapes[1]}")
        return problems

    def reset_num_updates(self) -> None:
        """Restart the count of updates at 0; start counting if updates were not counted."""
        device = self.num_updates.device
        del self.num_updates
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int, device=device))

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the averages from a model's parameters; call it after each optimizer step.

        Raise a LayoutError if a trained parameter has no average, an average has no parameter, or
        shapes differ. Nothing is written then.
        """
        done = int(self._count.read(self.num_updates))
        decay = self._limit.read(self.decay)
        if done >= 0:
            decay = min(decay, (2 + done) / (11 + done))
        step = done + 1 if done >= 0 else self._calls
        with defer_signals():  # an interrupt never separates an update from its count
            self._call(model, lambda averager: averager.update(model, 1.0 - decay, step))
            if done >= 0:
                self._count.increment(self.num_updates)
            self._calls += 1

    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into a model's parameters; raise the errors of :meth:`forward`."""
        self._call(model, lambda averager: averager.write_to(model))
        self._stored.mark_overwritten(list(model.parameters()))

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep copies of parameters for :meth:`restore`.

        Raise a StateError if :meth:`copy_to` has overwritten parameters whose weights are stored:
        :meth:`restore` them first, or set ``collected_params`` to ``[]`` to discard them.
        """
        self._stored.store(self, parameters)

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Write the stored weights back, in the order of :meth:`store`, and keep the copies.

        Raise a StateError if nothing is stored, and a LayoutError if the number or shapes of the
        tensors differ. Nothing is written then.
        """
        self._stored.restore(self, parameters)


def _state_of(checkpoint: Any) -> Mapping[str, Any]:
    """Return the tensors of a checkpoint: a Lightning checkpoint, or a plain state dict."""
    whole = check_mapping(checkpoint, "the checkpoint")
    return check_mapping(whole.get("state_dict", whole), "'state_dict' of the checkpoint")


def ema_weights(
    checkpoint: Mapping[str, Any], model: nn.Module, prefix: str = "model_ema."
) -> dict[str, Tensor]:
    """Return the averages in a Stable Diffusion checkpoint, by the model's parameter names.

    They are the checkpoint's own tensors. Load them with ``model.load_state_dict(...,
    strict=False)`` if the model has buffers.

    Parameters
    ----------
    checkpoint : mapping
        Whole checkpoint with ``model_ema.<name without dots>`` among its entries, or under
        ``"state_dict"``.
    model : torch.nn.Module
        The averaged model: in latent diffusion ``pipeline.model``, whose entries begin with
        ``model.``.
    prefix : str
        Prefix of the averages' entries. Default ``"model_ema."``.

    Raises
    ------
    CheckpointError
        If parameters have no average, or one of another shape or without contents, or averages have
        no parameter. The error names them.
    """
    state = _state_of(checkpoint)
    parameters = dict(model.named_parameters())
    names = _remove_dots(name for name in parameters if prefix + name.replace(".", "") in state)
    found = {name: state[prefix + short] for name, short in names.items()}
    problems = describe_unfit(
        (prefix + names[name], one, parameters[name]) for name, one in found.items()
    )
    problems += [
        f"{prefix + name.replace('.', '')!r} is missing"
        for name, parameter in parameters.items()
        if name not in names and parameter.requires_grad
    ]
    known = {prefix + short for short in (*names.values(), *_COUNTERS)}
    problems += [
        f"{name!r} belongs to no parameter"
        for name in state
        if name.startswith(prefix) and name not in known
    ]
    if problems:
        raise CheckpointError(
            "the averages in the checkpoint are not those of the model:\n"
            + format_problems(problems)
        )
    return found


def with_ema_weights(
    checkpoint: Mapping[str, Any],
    averages: Mapping[str, Tensor],
    *,
    decay: float = 0.9999,
    num_updates: int = 0,
    prefix: str = "model_ema.",
) -> dict[str, Any]:
    """Return a shallow copy of a Stable Diffusion checkpoint with its averages replaced by these.

    Parameters
    ----------
    checkpoint, prefix
        See :func:`ema_weights`; the checkpoint is not changed. Raise a CheckpointError if it is not
        a mapping of names.
    averages : mapping of str to Tensor
        Averages by the names of the averaged model's parameters, such as ``ema.shadow`` of a
        :class:`fastema.EMA` with ``buffers="skip"``. Raise a LayoutError if two names collide
        without dots.
    decay, num_updates : float, int
        Values with which a :class:`LitEma` that loads the checkpoint continues. Pass -1 updates for
        a constant decay. Defaults 0.9999 and 0.
    """
    state = _state_of(checkpoint)
    kept = {name: one for name, one in state.items() if not name.startswith(prefix)}
    kept[f"{prefix}decay"] = torch.tensor(decay, dtype=torch.float32)
    kept[f"{prefix}num_updates"] = torch.tensor(num_updates, dtype=torch.int)
    for name, short in _remove_dots(averages).items():
        kept[prefix + short] = averages[name]
    return kept if state is checkpoint else {**checkpoint, "state_dict": kept}
