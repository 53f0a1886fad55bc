"""Put an average into its model for evaluation, copy it into another one, or view it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, overload

from fastema.average.binding import ShadowSwap
from fastema.average.matching import names_of_state, pair_with_model, refuse_other_holder
from fastema.average.store import Entry
from fastema.average.updating import UpdatableAverage, Weights
from fastema.average.views import Shadow
from fastema.binding.binding import can_be_assigned
from fastema.binding.swap import copy_applied, round_to_weights, write_averages
from fastema.bridges.memory import allocate
from fastema.bridges.registry import describe, leaves_of, list_iterators, reshard, state_of
from fastema.engine.blocks import BlockSteps, RestoringBlock
from fastema.engine.interrupts import defer_signals
from fastema.engine.program import Program
from fastema.errors import BridgeError, StateError, format_problems
from fastema.layout.group import check_pair, drop_repeated, refuse_overlap, refuse_unwritable
from fastema.layout.spec import StateEntry

__all__ = ["SwappableAverage"]

Other = TypeVar("Other")


def _refuse_written(names: Sequence[str]) -> None:
    if names:
        raise StateError(
            "weights were written while the model held the average. The raw weights are restored; "
            "the average is lost, it now holds the written values:\n"
            + format_problems(repr(name) for name in names)
            + "\nLoad it from a checkpoint, or build a new one. Call restore(), or leave the "
            "swapped() block, before training or loading weights."
        )


class SwappableAverage(UpdatableAverage[Weights]):
    """Averages that can be applied to a model or copied into one; see :class:`Average`."""

    @property
    def applied(self) -> bool:
        """Whether the model holds the average now, between apply and restore."""
        return self._applied is not None

    def apply_shadow(self, model: Any = None, *, which: int | None = None) -> None:
        """Put the average into the model, in place, and keep the raw weights for :meth:`restore`.

        Average and weights swap places without a copy if their dtypes agree, or if a float32
        average meets bfloat16 weights (the model then gets the nearest bfloat16, ties away from
        zero). For other pairs of dtypes a spare buffer keeps the raw weights. Before the first
        update the model gets the weights the average was built from; before ``start_after`` it
        keeps its current ones.

        Parameters
        ----------
        model : optional
            The model to write, by default the averaged one; see :meth:`update`.
        which : int, optional
            Index of the average among the rules, negative from the end; required if there are
            several.

        Raises
        ------
        StateError
            If an average is applied already.
        ArgumentError
            If ``which`` is out of range, or missing with several averages.
        LayoutError
            If the model's tensors no longer match the average, or its arrays are immutable;
            nothing was written.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> w = np.array([1.0])
        >>> ema = fastema.EMA([w], decay=0.5)
        >>> w += 2
        >>> ema.update(); ema.apply_shadow(); w.item()
        2.0
        >>> ema.restore(); w.item()
        3.0
        """
        with self._lock:
            self._refuse_applied("apply_shadow")
            index = self._average_index(which)
            with self._current(model, write=True) as program:
                if self._is_synced():
                    self._sync_by(program)
                swap = self._binding.swap(index)
                with defer_signals():
                    self._progress.pause()
                    swap.apply()
                    self._applied = swap

    def restore(self, model: Any = None) -> None:
        """Put the raw weights back into the model, bit for bit, and take the average out of it.

        Do not train while the average is applied: the values in the model become the average.

        Parameters
        ----------
        model : optional
            The model given to :meth:`apply_shadow`, which is the default.

        Raises
        ------
        StateError
            If the average is not applied, is applied to another model, or the model's dtypes
            changed since. Also, after restoring the weights, if averaged PyTorch tensors were
            written while the average was applied, for example by an optimizer or
            ``load_state_dict``: the average now holds the written values. (Writing copied buffers
            is allowed, as :func:`fastema.update_bn` does.)
        LayoutError
            If the model's tensors no longer match the average.
        """
        with self._lock:
            _refuse_written(self._restore(model))

    def _restore(self, model: Any) -> list[str]:
        """Put the raw weights back; return the names of averaged tensors written since the swap."""
        if self._applied is None:
            raise StateError("restore() without apply_shadow(): the model holds its own weights")
        if model is not None:
            refuse_other_holder(
                list_iterators(model), self._applied.container, self._applied.watch.weights
            )
        reshard(self._applied.container, interrupted=True)
        with self._applied_swap() as swap:
            names = swap.watch.written()
            with defer_signals():
                swap.restore()
                self._applied = None
        return names

    @contextmanager
    def _applied_swap(self) -> Iterator[ShadowSwap]:
        """Yield the swap that is applied, relocated if the model's tensors have moved."""
        swap, binding = self._applied, self._binding
        assert swap is not None
        weights = swap.watch.weights
        with binding.current(swap.container, write=True, match=binding.match_subset):
            now = binding.weights
            if now is not swap.watch.now or binding.model.moving:
                problems = [
                    f"{name!r} was {was.dtype} and is {now[name].dtype}"
                    for name, was in weights.items()
                    if now[name].dtype != was.dtype
                ]
                if problems:
                    raise StateError(
                        "the model changed its dtype while the average was applied:\n"
                        + format_problems(problems)
                        + "\nChange it back, then restore(): the raw weights are kept exactly, the "
                        "average only as the other dtype left it."
                    )
                swap.memory.relocate(binding.of(swap.index))
                swap.watch.now = now
            yield swap

    def averaged(self, *, which: int | None = None) -> Any:
        """Return the average as new arrays, in a container like that of the weights.

        Use it to evaluate and save with frameworks whose arrays are immutable (JAX). The average
        itself does not change.

        Parameters
        ----------
        which : int, optional
            See :meth:`apply_shadow`.

        Returns
        -------
        pytree, list, tuple, dict or array
            A container with the structure of the latest weights; its arrays have their dtypes.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            If ``which`` is out of range, or missing with several averages.
        BridgeError
            If the weights belong to a module or model, which cannot be duplicated.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> ema = fastema.EMA({"w": np.array([1.0])}, decay=0.5)
        >>> ema.averaged()
        {'w': array([1.])}
        """
        with self._lock:
            self._refuse_applied("averaged")
            which = self._average_index(which)
            self._sync()
            binding = self._binding
            structure = binding.model.structure
            if structure is None:
                raise BridgeError(
                    "cannot make a new module: use swapped(), or copy_to(other_module)"
                )
            pairs = binding.of(which)
            shown = {
                pair.name: self._store.sets[which][pair.name].to_framework(array)
                for pair, array in zip(pairs, round_to_weights(pairs), strict=True)
            }
            names = [self._names.aliases.get(name, name) for name in binding.model.order]
            return structure.rebuild([shown[name] for name in names])

    @overload
    def swapped(self, model: None = None, *, which: int | None = None) -> RestoringBlock[Weights]:
        pass

    @overload
    def swapped(self, model: Other, *, which: int | None = None) -> RestoringBlock[Other]:
        pass

    def swapped(self, model: Any = None, *, which: int | None = None) -> RestoringBlock[Any]:
        """Return a context manager in which the model holds the average.

        The raw weights are restored on exit, also after an exception. ``with ema.swapped() as
        weights:`` binds the model, or, where arrays are immutable (JAX), the new container that
        :meth:`averaged` returns. The result also works as a decorator.

        Parameters
        ----------
        model : optional
            See :meth:`apply_shadow`.
        which : int, optional
            See :meth:`apply_shadow`.

        Raises
        ------
        StateError, ArgumentError, LayoutError
            On entry, as :meth:`apply_shadow`.
        StateError
            On exit, as :meth:`restore`, unless the block itself raised.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> w = np.array([1.0])
        >>> ema = fastema.EMA([w], decay=0.5)
        >>> w += 2
        >>> ema.update()
        >>> with ema.swapped() as weights:
        ...     weights[0].item()
        2.0
        """
        model = None if model is None else list_iterators(model)
        return RestoringBlock(lambda: self._swap_steps(model, which))

    def _swap_steps(self, model: Any, which: int | None) -> BlockSteps[Any]:
        if self._binding.model.fixed:
            return BlockSteps(apply=lambda: self.averaged(which=which), restore=lambda: None)
        own: list[ShadowSwap | None] = []
        written: list[str] = []

        def apply() -> Any:
            self.apply_shadow(model, which=which)
            own.append(self._applied)
            return self._container if model is None else model

        def restore() -> None:
            with self._lock:  # leave an average that an outer block applied
                if self._applied is not None and self._applied in own:
                    written.extend(self._restore(model))

        return BlockSteps(apply, restore, lambda: _refuse_written(written))

    def copy_to(self, model: Any, *, which: int | None = None) -> None:
        """Overwrite a model's weights with the average, rounded to the model's dtypes.

        The previous weights are not kept; use :meth:`swapped` to get them back.

        Parameters
        ----------
        model : module, array, list, tuple or dict
            Must have the names and shapes of the average. Its other frozen tensors and buffers are
            left alone.
        which : int, optional
            See :meth:`apply_shadow`.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            If ``which`` is out of range, or missing with several averages.
        LayoutError
            If tensors are missing or differ in shape; the message names them, nothing was written.
        """
        with self._lock:
            self._refuse_applied("copy_to")
            entries = self._store.sets[self._average_index(which)]
            self._sync()
            container = list_iterators(model)
            reshard(container)
            pairs = drop_repeated(pair_with_model(leaves_of(container), entries, self._names))
            there = [pair for pair in pairs if not can_be_assigned(pair.src)]
            for pair in there:
                check_pair(pair)
                refuse_unwritable(pair.name, pair.src)
            refuse_overlap(
                [(pair.name, pair.src) for pair in there],
                [(f"average of {pair.name}", pair.dst) for pair in there],
            )
            write_averages(pairs)

    def model_state_dict(self, model: Any = None, *, which: int | None = None) -> dict[str, Any]:
        """Return what ``model.state_dict()`` would hold with the average applied, in new tensors.

        Use it with ``other.load_state_dict(ema.model_state_dict())``, ``torch.save``, safetensors
        or :func:`torch.func.functional_call`. The model is only read.

        Parameters
        ----------
        model : optional
            See :meth:`update`.
        which : int, optional
            See :meth:`apply_shadow`.

        Returns
        -------
        dict of str to tensor
            The keys are those of the model without wrappers, as in :attr:`shadow`: the components
            that DDP, ``torch.compile`` and activation checkpointing add, such as ``module.`` and
            ``_orig_mod.``, are left out. Load it into the unwrapped model. The values are averages
            rounded to the model's dtypes; tied weights share one tensor. Entries that the average
            leaves out (frozen weights, extra state) are the model's own, not copies. Containers
            without ``state_dict()`` give the names of :attr:`shadow` and of tied arrays.

        Raises
        ------
        StateError
            While an average is applied: call ``model.state_dict()`` instead.
        ArgumentError
            If ``which`` is out of range, or missing with several averages.
        LayoutError
            If a shape differs.

        Examples
        --------
        >>> import torch, fastema
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = fastema.EMA(model)
        >>> list(ema.model_state_dict())
        ['weight', 'bias']
        """
        with self._lock:
            self._refuse_applied("model_state_dict")
            entries, found, kept = self._state_of(model, which)
            averaged = {name: key for key, name in reversed(kept.items()) if name in entries}
            wanted = {name: describe(found[key].value) for name, key in averaged.items()}
            # Allocate each tensor on its own, so that keeping one does not keep all of them.
            made = {name: allocate([(spec, spec.kind)])[0] for name, spec in wanted.items()}
            pairs = [
                entries[name].pair(spec, 0)._replace(name=averaged[name], ring=None)
                for name, (_, spec) in made.items()
            ]
            for pair in pairs:
                check_pair(pair)
            Program({"all": pairs}).run({"all": "cast_back"})
            shown = {name: entries[name].to_framework(array) for name, (array, _) in made.items()}
            return {one.key: shown.get(kept[key], one.value) for key, one in found.items()}

    def _state_of(
        self, model: Any, which: int | None
    ) -> tuple[Mapping[str, Entry], Mapping[str, StateEntry], dict[str, str]]:
        """Return an average's entries, the model's state, and for its keys the entries' names."""
        entries = self._store.sets[self._average_index(which)]
        self._sync()
        container = self._container if model is None else list_iterators(model)
        reshard(container)
        found = state_of(container)
        return entries, found, names_of_state(found, entries, self._names)

    # -- the average ------------------------------------------------------------------------------

    @property
    def shadows(self) -> tuple[Shadow, ...]:
        """The mapping of names to tensors of every average, in the order of the rules."""
        # Not cached: a reference cycle with the average would keep GPU memory alive.
        return tuple(
            Shadow(list(entries), partial(self._tensor, index))
            for index, entries in enumerate(self._store.sets)
        )

    @property
    def shadow(self) -> Shadow:
        """The averaged and copied tensors by name; with several averages use :attr:`shadows`."""
        return self.shadows[self._average_index(None)]

    def _tensor(self, index: int, name: str) -> Any:
        with self._lock:
            name = self._names.aliases.get(name, name)
            entry = self._store.sets[index][name]
            array, _ = entry.parts["shadow"]
            applied = self._applied
            # All averages share the copied tensors, which are swapped with any of them.
            if applied is None or (index != applied.index and entry.averaged):
                self._sync()
            elif self._binding.is_unmoved(name):  # skip checking all other tensors
                (array,) = copy_applied([self._binding.pair(name, index)])
            else:
                with self._applied_swap():
                    (array,) = copy_applied([self._binding.pair(name, index)])
            return entry.to_framework(array)
