"""Save and load an average's state; move it to another device or dtype."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from fastema.average.binding import ShadowBinding
from fastema.average.entries import ShadowFormat
from fastema.average.evaluation import SwappableAverage
from fastema.average.options import Rounding, check_literal, format_of, parse_destination
from fastema.average.schedule_counter import ScheduleCounter, refuse_uneven, tables_for
from fastema.average.state import SavedOrMine, pack, unpack
from fastema.average.store import Store, Tensors
from fastema.average.updating import Weights
from fastema.binding.swap import AppliedCopy, copy_applied_into
from fastema.engine.collector import pause_gc
from fastema.engine.interrupts import defer_signals
from fastema.engine.streams import keep_for_graphs
from fastema.errors import ArgumentError, StateError
from fastema.hints import check_options

__all__ = ["SaveableAverage"]

Self = TypeVar("Self", bound="SaveableAverage[Any]")


class SaveableAverage(SwappableAverage[Weights]):
    """Averages that can be saved, loaded and moved; see :class:`Average`."""

    def to(
        self: Self, *target: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False
    ) -> Self:
        """Move the average to a device, or change the dtype of its averaged tensors, in place.

        Takes the arguments of :meth:`torch.Tensor.to`: ``to(device)``, ``to(dtype)``, ``to(device,
        dtype)``, ``to(tensor)`` for the device and dtype of that tensor, and keywords. A narrower
        dtype rounds the values once; stochastic rounding stays on or off. A CUDA graph that
        captured an update keeps updating the old memory: capture it again.

        Parameters
        ----------
        *target : device, dtype, str or array
            A string counts as a dtype if ``shadow_dtype`` accepts it, otherwise as a device.
        device : str, int or device, optional
            By default the device does not change.
        dtype : dtype or str, optional
            See ``shadow_dtype``; by default the dtype does not change.
        non_blocking : bool
            Accepted and ignored: the copies are done when the call returns.

        Returns
        -------
        Average
            The average itself.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            If device or dtype is given twice; for the dtype of a windowed mean.
        DTypeError
            If the average cannot have this dtype.
        DeviceError, BridgeError
            If the weights' framework has no such device.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> ema = fastema.EMA([np.ones(2, np.float32)])
        >>> ema.to(np.float64).shadow["0"].dtype
        dtype('float64')
        """
        device, dtype = parse_destination(target, device, dtype)
        with self._lock:
            self._refuse_applied("to")
            store, stored_as = self._store, self._format
            self._wait_for_the_ring()
            if dtype is not None and stored_as.window:
                raise ArgumentError(
                    f"dtype={dtype!r}: a windowed mean keeps its dtype; build another one"
                )
            if device is not None:
                store = store.on(device, ring_on_host=stored_as.ring_on_host)
            if dtype is not None:
                rounding: Rounding = "stochastic" if stored_as.random else "nearest"
                wanted = format_of(dtype, rounding, stored_as.num_averages, "dtype")
                stored_as = stored_as._replace(dtype=wanted.dtype, split=wanted.split)
                store = store.cast(stored_as)
            binding = self._bind(self._binding.container, store)
            count = self._count
            if count is not None:
                done, skipped = count.done(), count.skipped()
                contexts = binding.contexts
                count = ScheduleCounter(contexts, self._schedule, self._seed, done, skipped)
                self._warm_up(count, binding)
            if self._was_captured:  # its replays write the old memory, which must not be reused
                keep_for_graphs(self._store, self._count)
            self._progress.pause()  # it writes to the old memory
            self._binding, self._store, self._format = binding, store, stored_as
            self._count, self._was_captured = count, False
            return self

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Return the state needed to resume the run: counters, schedule and averages by name.

        It consists of tensors by name, as :func:`safetensors.torch.save_file`, :func:`torch.save`
        and :mod:`torch.distributed.checkpoint` take them. It also holds the average while that is
        applied to the model, never the raw weights in its place. Averages of DTensors are DTensors:
        all ranks must call this method.

        Parameters
        ----------
        copy : bool
            True by default: row-major copies. False saves their memory and returns the average's
            own tensors, with the strides of the weights: write them out before calling anything
            else. (While an average is applied, the tensors are always copies.)

        Returns
        -------
        dict
            ``"shadow.<i>.<name>"`` is the i-th average of a tensor. ``"residual.<i>.<name>"`` and
            ``"ring.<i>.<name>"`` are the second half of a split average or the rounding error of a
            windowed mean, and the windowed mean's ring. ``"fastema"``, bytes of JSON, has the
            schedule, the counters, and the names of a PyTorch model's parameters in order
            (docs/reference/formats.md).

        Raises
        ------
        LayoutError
            If ranks that share DTensors disagree about the settings.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> ema = fastema.EMA({"w": np.array([1.0])})
        >>> state = ema.state_dict()
        >>> list(state), state["shadow.0.w"]
        (['fastema', 'shadow.0.w'], array([1.]))
        """
        with self._lock:
            if self._ranks is not None:
                self._ranks.compare(self._common_settings())
            counters = {
                "num_updates": self.num_updates,
                "num_skipped": self.num_skipped,
                "seed": self._seed,
            }
            log_decays = self._progress.log_decays
            if self._count is not None:  # on the GPU every update is one step
                log_decays = self._schedule.log_decays(counters["num_updates"])
            rounding: Rounding = "stochastic" if self._format.random else "nearest"
            return pack(
                self._kind,
                counters,
                self._schedule,
                log_decays,
                rounding,
                self._collect_tensors(copy),
                self._names.parameters,
            )

    def _wait_for_the_ring(self) -> None:
        # The host reads a ring that kernels on the device write: nothing else orders the two.
        if self._store.on_host:
            self._binding.wait()

    @pause_gc
    def _collect_tensors(self, copy: bool) -> Tensors:
        self._sync()
        self._wait_for_the_ring()
        if self._applied is None:
            return (self._store.duplicate(row_major=True) if copy else self._store).tensors()
        with self._applied_swap() as swap:
            # Overwrite the raw weights in the copy: they must not be saved.
            store = self._store.duplicate(row_major=True)
            applied = [
                (index, entry.name)
                for index, entry in self._store
                if index == swap.index or not entry.averaged
            ]
            parts = [store.sets[index][name].parts for index, name in applied]
            copy_applied_into(
                [self._binding.pair(name, index) for index, name in applied],
                [
                    AppliedCopy(p["shadow"][1], p["residual"][1] if "residual" in p else None)
                    for p in parts
                ],
            )
        return store.tensors()

    @check_options
    def load_state_dict(self, state: Mapping[str, Any], *, schedule: SavedOrMine = "saved") -> None:
        """Load a saved average, so that the run continues to the bit as if never interrupted.

        Counters, seed and rounding are restored, and by default the schedule. The tensors are
        copied into the average's memory.

        Parameters
        ----------
        state : mapping
            The result of :meth:`state_dict`, also from a file: by ``torch.load``, safetensors'
            ``load_file`` or :func:`fastema.checkpoint.load_state`.
        schedule : {"saved", "mine"}
            Rules, ``update_every`` and ``start_after`` to continue with. ``"saved"`` (the default)
            restores the saved ones, and warns if they differ from those this average was built
            with. ``"mine"`` keeps the latter, to change the decay on purpose.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            For another value of ``schedule``.
        CheckpointError
            If the state does not fit; the message lists every mismatch of names, shapes, dtypes and
            schedule. Nothing was changed.

        Warns
        -----
        UserWarning
            If the saved schedule replaces a different one.
        """
        check_literal(schedule, "schedule", SavedOrMine)
        with self._lock:
            self._refuse_applied("load_state_dict")
            own = self._schedule
            saved = unpack(state, self._kind, own, self._store.specs(), schedule)
            program = self._store.load(saved.tensors)
            tables = [] if self._count is None else tables_for(saved.schedule)
            if self._count is not None:
                refuse_uneven(saved.schedule, saved.counters["num_updates"], saved.log_decays)
            program.prepare({"all": "copy"})  # may fail, so before any change
            rounded = self._change_rounding(saved.rounding)
            self._wait_for_the_ring()
            with defer_signals():
                done = saved.counters["num_updates"]
                self._progress.set(done, saved.log_decays)
                self._num_skipped = saved.counters["num_skipped"]
                self._pending_steps = 0
                self._seed, self._schedule = saved.counters["seed"], saved.schedule
                self._format, self._store, self._binding = rounded
                if self._count is not None:  # before the copy: this waits for pending replays
                    self._count.set(self._schedule, tables, self._seed, done, self._num_skipped)
                program.run({"all": "copy"})
        if saved.schedule != own:
            warnings.warn(
                "the saved schedule replaces the one this average was built with; "
                f"pass schedule='mine' to keep that one\n  saved: {saved.schedule}\n  mine: {own}",
                stacklevel=3,  # past check_options
            )

    def _change_rounding(self, rounding: Rounding) -> tuple[ShadowFormat, Store, ShadowBinding]:
        """Return format, store and binding with this rounding of 16-bit averages, in place."""
        stored_as = self._format._replace(random=rounding == "stochastic")
        if stored_as == self._format:
            return stored_as, self._store, self._binding
        store = self._store.with_rounding(stored_as)
        binding = self._bind(self._binding.container, store)
        if self._count is not None:
            self._warm_up(self._count, binding)
        return stored_as, store, binding

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to copy or pickle: the copy would not be bound to a model."""
        raise StateError("averages cannot be copied or pickled; build another, load state_dict()")
