"""A moving average of weights for the Hugging Face ``Trainer``, which has none built in."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from fastema.average import EMA
from fastema.average.checkpoints import Checkpoints, choose_checkpoints, training_weights
from fastema.average.options import (
    AverageOptions,
    check_ema_options,
    check_literal,
    check_which,
    expand_options,
)
from fastema.bridges.registry import is_divided
from fastema.checkpoint import files
from fastema.checkpoint.state import read_state, read_tensors, write_tensors
from fastema.checkpoint.stored import AVERAGE_FILE, TRAINING_FILE
from fastema.errors import ArgumentError, CheckpointError, StateError, format_problems
from fastema.rules import Rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EMACallback"]

AtEnd = Literal["average", "raw"]
OnMissing = Literal["raise", "begin"]

_WEIGHTS: Final = (
    TRAINING_FILE,
    "model*.safetensors",
    "adapter_model*.safetensors",
    "pytorch_model*.bin",
    "adapter_model*.bin",
)
"""Patterns of the file names that the Trainer and this callback use for weights."""

_SAMPLE_BYTES, _NUM_SAMPLES = 4096, 64
"""Bytes hashed per position in a file, and positions in addition to those of tensors."""


def _hash_weight_files(folder: Path) -> dict[str, str]:
    """Return a digest of each weight file in a folder, by file name."""
    found = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    return {path.name: _hash_file(path) for path in sorted(found)}


def _hash_file(path: Path) -> str:
    """Return a hash of a file's size and of samples of each tensor: fast for files of any size."""
    size = path.stat().st_size
    places = {size * i // _NUM_SAMPLES for i in range(_NUM_SAMPLES)} | {
        max(size - _SAMPLE_BYTES, 0)
    }
    with suppress(CheckpointError):  # another format, or dtypes that averages cannot have
        for one in files.read(path).tensors.values():
            last = one.offset + max(one.nbytes - _SAMPLE_BYTES, 0)
            places |= {one.offset, (one.offset + last) // 2, last}
    found = blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as opened:
        for place in sorted(places):
            opened.seek(place)
            found.update(opened.read(_SAMPLE_BYTES))
    return found.hexdigest()


def _clear_folder(folder: Path) -> None:
    """Delete the average of earlier weights, and partial files that killed runs left behind."""
    for name in (AVERAGE_FILE, TRAINING_FILE):
        for path in (folder / name, *folder.glob(f".{name}.*.part")):
            path.unlink(missing_ok=True)


_RUN_ATTRIBUTES: Final = (
    "_ema",
    "_model",
    "_holds_final_weights",
    "_last_step",
    "_was_updated_early",
    "_saved_step",
    "_step_being_saved",
    "_resumed",
    "_trainer",
)
"""Attributes that belong to one run of one trainer."""


class _WrappedMethod:
    """Wraps a method of one trainer in a callback's method, without keeping the trainer alive.

    A copy of the trainer gets its own wrapper, for the copy of the callback.
    """

    def __init__(self, callback: EMACallback, trainer: Any, name: str, around: str) -> None:
        self.callback = callback
        self._name, self._callback_method = name, around
        self._replacement = vars(trainer).get(name)  # a replacement that somebody else installed
        self._trainer = weakref.ref(trainer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer()
        inner = self._replacement or partial(getattr(type(trainer), self._name), trainer)
        return getattr(self.callback, self._callback_method)(trainer, inner, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        trainer = self._trainer()
        return vars(self) | {"_trainer": trainer, "joined": self.callback._trainer() is trainer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trainer, joined = state.pop("_trainer"), state.pop("joined")
        vars(self).update(state, _trainer=weakref.ref(trainer))
        if joined:
            self.callback._trainer = weakref.ref(trainer)


_SHARDED_MESSAGE: Final = (
    "EMACallback saves whole weights, but the weights of this model are sharded (FSDP, tensor "
    "parallel). With FSDP2 keep fastema.EMA(model) in a callback of your own: update() "
    "in on_step_end, and its state_dict() in a folder of torch.distributed.checkpoint "
    "(docs/sharded.md); otherwise use DDP, or ZeRO up to stage 2"
)


@expand_options
class EMACallback(TrainerCallback):  # type: ignore[misc]
    """Exponential moving average of the weights that a ``Trainer`` trains.

    It computes ``avg = x`` when training begins, and ``avg += (1 - decay) * (x - avg)`` after each
    optimizer step. For an evaluation, the average and the weights swap, bit for bit. The model in a
    checkpoint folder is the average that was evaluated; beside it are the state of the average,
    ``ema.safetensors``, and the weights to continue with, ``training_weights.safetensors``. A run
    that resumes with this callback continues bit for bit. See docs/trainers.md for more.

    Parameters
    ----------
    decay : float or rule, or a sequence of them
        Weight of the old average (default 0.9999); see :class:`fastema.EMA`.
    evaluate_with_average : bool
        Whether ``evaluate`` and ``predict`` use the average, during and after training (default
        True).
    at_end : {"average", "raw"}
        What the model holds when ``train`` returns, and what ``trainer.save_model()`` then saves
        (default "average").
    checkpoints : {"average", "raw"}, optional
        What the model in a checkpoint folder is, and what ``trainer.save_model()`` saves while
        ``train`` runs. By default the weights that ``evaluate`` uses, which choose the best
        checkpoint: the average, or with ``evaluate_with_average=False`` the training weights. A run
        resumes from the checkpoints of either setting.
    on_missing : {"raise", "begin"}
        What to do when a run resumes from a checkpoint without an average: raise (the default), or
        begin an average with the weights of that checkpoint.
    which : int, optional
        With several averages, the index of the one to evaluate, to save as the model and to leave
        in the model.
    zero_debias : bool
        Start from zero and correct the bias, see :class:`fastema.EMA`.
    **options : AverageOptions
        Options that all averages share; see :class:`fastema.average.AverageOptions`.

    Raises
    ------
    ArgumentError
        For an invalid argument. When training begins, for sharded weights (FSDP, ZeRO-3).
    StateError
        When training begins, if the callback is not attached to the trainer: see :meth:`attach`.
    CheckpointError
        When resuming from a checkpoint without its average, or when the trainer saves a checkpoint
        in an unknown folder.

    Warns
    -----
    UserWarning
        When training begins, if the average is evaluated and ``checkpoints="raw"``. When a
        checkpoint is saved, if a trainer does so without ``save_model()``: it holds the training
        weights.
    """

    def __init__(
        self,
        decay: float | Rule | Sequence[float | Rule] = 0.9999,
        *,
        evaluate_with_average: bool = True,
        at_end: AtEnd = "average",
        checkpoints: Checkpoints | None = None,
        on_missing: OnMissing = "raise",
        which: int | None = None,
        zero_debias: bool = False,
        **options: Unpack[AverageOptions],
    ) -> None:
        self.at_end: AtEnd = check_literal(at_end, "at_end", AtEnd)
        self.on_missing: OnMissing = check_literal(on_missing, "on_missing", OnMissing)
        choose_checkpoints(checkpoints, evaluate_with_average)
        self._checkpoints = checkpoints
        check_ema_options(decay, zero_debias=zero_debias, **options)
        self._which = check_which(which, decay)
        self.evaluate_with_average = evaluate_with_average
        self._decay = decay
        self._options: dict[str, Any] = {"zero_debias": zero_debias, **options}

    _ema: EMA | None = None
    _model: Any = None
    _holds_final_weights = False
    _last_step = 0  # the latest step whose weights are in the average
    _was_updated_early = False  # whether they were added before this callback's on_step_end
    _saved_step: int | None = None  # the step whose checkpoint already has the average
    _step_being_saved: int | None = None  # while _save_checkpoint runs
    _resumed: Path | None = None  # the checkpoint of the running train()
    _trainer: Callable[[], Any] = staticmethod(lambda: None)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the average and the trainer, which belong to a run."""
        return {name: value for name, value in vars(self).items() if name not in _RUN_ATTRIBUTES}

    @property
    def ema(self) -> EMA:
        """The average; a StateError before ``train`` begins."""
        if self._ema is None:
            raise StateError("there is no average yet: trainer.train() creates it")
        return self._ema

    # -- the trainer -------------------------------------------------------------------------------

    def attach(self, trainer: Any) -> EMACallback:
        """Attach to a trainer, and add this callback to its list if it is not there yet.

        A callback in ``Trainer(callbacks=...)`` needs this call too, before ``train``: the Trainer
        does not tell callbacks which trainer calls them, and the average enters its evaluations and
        checkpoints. Returns this callback. Raises an ArgumentError if ``trainer`` is not a
        ``Trainer``, a StateError if it already has another ``EMACallback``.
        """
        handler = getattr(trainer, "callback_handler", None)
        if handler is None or not hasattr(trainer, "evaluation_loop"):
            raise ArgumentError(
                f"attach({type(trainer).__name__}): expected a transformers.Trainer"
            )
        if self._trainer() is trainer:
            return self
        if any(isinstance(one, EMACallback) and one is not self for one in handler.callbacks):
            raise StateError(
                "the trainer has an EMACallback already: for several averages give one callback "
                "several decays, decay=(0.99, 0.999)"
            )
        if not self._is_among(handler):
            trainer.add_callback(self)
        self._trainer = weakref.ref(trainer)
        # Wrap methods: no event reports that an evaluation begins or fails, or which checkpoint is
        # resumed, and on_save comes after older checkpoints are deleted. Instance attributes shadow
        # the class's methods.
        for name, around in (
            ("evaluation_loop", "_evaluate_with_average"),
            ("_save_checkpoint", "_save_with_average"),
            ("save_model", "_save_model_in_training"),
            ("train", "_train"),
        ):
            there = vars(trainer).get(name)
            if not (isinstance(there, _WrappedMethod) and there.callback is self):
                setattr(trainer, name, _WrappedMethod(self, trainer, name, around))
        return self

    def _is_among(self, handler: Any) -> bool:
        return any(one is self for one in handler.callbacks)

    def _belongs_to(self, trainer: Any) -> bool:
        return trainer is self._trainer() and self._is_among(trainer.callback_handler)

    def _train(
        self,
        trainer: Any,
        inner: Callable[..., Any],
        resume_from_checkpoint: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call ``trainer.train``, and note the checkpoint that it resumes from."""
        if self._is_among(trainer.callback_handler):
            self._trainer = weakref.ref(trainer)
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(trainer.args.output_dir)
        self._resumed = Path(found) if found else None
        try:
            return inner(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._resumed = None

    def _evaluate_with_average(
        self, trainer: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call ``trainer.evaluation_loop`` with the average in the model."""
        averaged = self._belongs_to(trainer) and trainer.model is self._model
        if not (averaged and self.evaluate_with_average):
            return inner(*args, **kwargs)
        given = trainer.args
        if not trainer.is_in_train and (given.fp16_full_eval or given.bf16_full_eval):
            # The loop would cast the model while it holds the average, permanently.
            dtype = torch.float16 if given.fp16_full_eval else torch.bfloat16
            self._model.to(dtype=dtype, device=given.device)
        with self.swapped():
            return inner(*args, **kwargs)

    def _save_with_average(
        self, trainer: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call ``trainer._save_checkpoint``, and save the average beside the weights."""
        if self._ema is None or not (self._belongs_to(trainer) and trainer.is_in_train):
            return inner(*args, **kwargs)
        self._refuse_applied("is about to save a checkpoint")
        step = trainer.state.global_step
        if step > self._last_step:  # a callback before this one triggered the save
            self._update_at(step, trainer.optimizer)
            self._was_updated_early = True
        self._saved_step, self._step_being_saved = None, step
        try:
            found = inner(*args, **kwargs)
        finally:
            self._step_being_saved = None
        if trainer.args.should_save and self._saved_step is None:
            trial = kwargs.get("trial", args[1] if len(args) > 1 else None)
            self._write_to_checkpoint(Path(trainer._get_output_dir(trial)), step)
        return found

    def _save_model_in_training(
        self,
        trainer: Any,
        inner: Callable[..., Any],
        output_dir: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call ``trainer.save_model`` with the average in the model if checkpoints hold it.

        In a checkpoint, also save the state of the average, and the training weights.
        """
        if self._ema is None or not (self._belongs_to(trainer) and trainer.is_in_train):
            return inner(output_dir, *args, **kwargs)
        step = self._step_being_saved
        folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
        if step is not None and trainer.args.should_save:
            _clear_folder(folder)
        averaged = self._saves_average
        with self.swapped() if averaged else nullcontext():
            found = inner(output_dir, *args, **kwargs)
        if step is not None and trainer.args.should_save and folder.is_dir():
            self._write(folder, step, averaged=averaged)
        return found

    @property
    def _saves_average(self) -> bool:
        return choose_checkpoints(self._checkpoints, self.evaluate_with_average) == "average"

    def _write_to_checkpoint(self, output_dir: Path, step: int) -> None:
        """Write the average into the folder of an existing checkpoint."""
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if not folder.is_dir():
            raise CheckpointError(
                f"the trainer has saved a checkpoint, but not in {folder}, where the average "
                "belongs: override _get_output_dir if _save_checkpoint saves elsewhere"
            )
        if self._saves_average:
            warnings.warn(
                f"the trainer has saved {folder} without save_model(): its model is the training "
                "weights, not the average (EMACallback(checkpoints='raw') for all checkpoints)",
                stacklevel=2,
            )
        _clear_folder(folder)
        self._write(folder, step, averaged=False)

    def _write(self, folder: Path, step: int, *, averaged: bool) -> None:
        """Write the average's state, and the training weights if the model is the average."""
        if averaged:
            weights = training_weights(self._model.state_dict(), self.ema)
            for name in self.ema.aliases:
                weights.pop(name, None)
            beside = json.dumps(_hash_weight_files(folder))
            write_tensors(folder / TRAINING_FILE, weights, weights=beside)
        known = json.dumps(_hash_weight_files(folder))
        with self.ema.lock:  # block updates on other threads to write a consistent state
            state = self.ema.state_dict(copy=False)
            write_tensors(folder / AVERAGE_FILE, state, step=str(step), weights=known)
        self._saved_step = step

    # -- the average in the model ------------------------------------------------------------------

    def swapped(self) -> AbstractContextManager[Any]:
        """Return a context manager in which the model holds the average.

        The weights are restored on exit, also after an exception. Does nothing if the model already
        holds the average. Raises a StateError before training.
        """
        if self._holds_final_weights or self.ema.applied:
            return nullcontext()
        return self.ema.swapped(which=self._which)

    def save_model(self, output_dir: str | None = None) -> None:
        """Call ``trainer.save_model(output_dir)`` with the average instead of the weights."""
        trainer = self._trainer()
        if trainer is None:
            raise StateError(
                "save_model() saves by the trainer that EMACallback is attached to, and there is "
                "none: call EMACallback(...).attach(trainer) before train(), or "
                "model.save_pretrained(...) inside `with callback.swapped()`"
            )
        with self.swapped():
            trainer.save_model(output_dir)

    # -- the Trainer's events ----------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Create the average, or continue the average of a checkpoint."""
        trainer = self._trainer()
        if trainer is not None and trainer.state is not state:  # another trainer calls
            trainer = None
        if trainer is None and (self.evaluate_with_average or self._saves_average):
            raise StateError(
                "EMACallback is not attached to the trainer, whose evaluation and checkpoints "
                "should use the average: call EMACallback(...).attach(trainer) before train(), or "
                "pass evaluate_with_average=False"
            )
        resumed = self._resumed
        if getattr(trainer, "is_fsdp_enabled", False):
            raise ArgumentError(_SHARDED_MESSAGE)
        if state.global_step and resumed is None:
            raise StateError(
                f"training resumes at step {state.global_step}, but EMACallback does not know "
                "the checkpoint: pass it to train(resume_from_checkpoint=...) of a trainer that "
                "the callback is attached to"
            )
        self._ema = self._model = self._saved_step = None  # free the old average's memory first
        self._holds_final_weights = self._was_updated_early = False
        if any(map(is_divided, model.parameters())):
            raise ArgumentError(_SHARDED_MESSAGE)
        saved = None if resumed is None else self._find_saved_average(resumed, state.global_step)
        if resumed is not None:
            _load_training_weights(model, resumed)
        ema = EMA(model, self._decay, **self._options)
        if saved is not None:
            self._resume(ema, saved)
        self._ema, self._model, self._last_step = ema, model, state.global_step
        if self.evaluate_with_average and not self._saves_average:
            warnings.warn(
                "EMACallback(checkpoints='raw'): evaluate() uses the average, which chooses the "
                "best checkpoint, but from_pretrained() of a checkpoint, and save_model() in "
                "training, use the training weights",
                stacklevel=2,
            )

    def _find_saved_average(self, folder: Path, step: int) -> files.File | None:
        """Return the file with a checkpoint's average; None to begin a new average."""
        path = folder / AVERAGE_FILE
        if not path.exists():
            if self.on_missing == "begin":
                return None
            raise CheckpointError(
                f"{folder} has no {AVERAGE_FILE}: its run had no EMACallback; with "
                "on_missing='begin' the average begins with the weights of the checkpoint"
            )
        found = files.read(path)
        if found.metadata.get("step") != str(step):
            raise CheckpointError(
                f"{path} is the average of step {found.metadata.get('step', '?')}, and training "
                f"resumes at step {step}"
            )
        _check_weights_beside(found)
        return found

    def _resume(self, ema: EMA, found: files.File) -> None:
        own = ema.schedule
        _load_average(ema, found)
        if ema.schedule != own:
            warnings.warn(
                f"the average of {found.path.parent} continues with its saved schedule, "
                f"{ema.schedule}, not with the schedule of EMACallback, {own}; for that, delete "
                f"{AVERAGE_FILE} there and begin a new average with on_missing='begin'",
                stacklevel=2,
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise a StateError if the step would train the average."""
        self._refuse_applied("is about to make a step")

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Update the average if the optimizer has changed the weights."""
        if not self._was_updated_early:
            self._update_at(state.global_step, optimizer)
        self._was_updated_early = False

    def _update_at(self, step: int, optimizer: Any) -> None:
        if not getattr(optimizer, "step_was_skipped", False):
            self.ema.update()
        self._last_step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average into the checkpoint's folder, unless it is already there."""
        self._refuse_applied("has saved a checkpoint")
        if args.should_save and self._saved_step != state.global_step:
            trainer = self._trainer()
            folder = args.output_dir if trainer is None else trainer._get_output_dir(None)
            self._write_to_checkpoint(Path(folder), state.global_step)

    def _refuse_applied(self, what: str) -> None:
        if self._ema is not None and self._ema.applied:
            raise StateError(
                f"the trainer {what} while the average is in the model instead of its "
                "weights: call ema.restore(), or leave the swapped() block, first"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the average or the weights in the model, according to ``at_end``."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None:
            folder = Path(best)
            try:
                found = files.read(folder / AVERAGE_FILE)
                _check_weights_beside(found)
                _load_average(self.ema, found)
            except CheckpointError as error:
                lacks = not (folder / AVERAGE_FILE).exists()
                problem = (
                    f"has no {AVERAGE_FILE}" if lacks else f"has the wrong {AVERAGE_FILE} ({error})"
                )
                held = "average" if (folder / TRAINING_FILE).exists() else "training weights"
                warnings.warn(
                    f"the best checkpoint, {best}, {problem}: the model holds the {held} in the "
                    "model files of that checkpoint",
                    stacklevel=2,
                )
                self._holds_final_weights = True
                return
            if self.at_end == "raw":  # the trainer has loaded the model of the checkpoint
                _load_training_weights(self._model, folder)
        if self.at_end == "average":
            self.ema.copy_to(self._model, which=self._which)
            self._holds_final_weights = True


def _check_weights_beside(found: files.File) -> None:
    """Raise a CheckpointError if a file does not belong to the weights beside it."""
    known: dict[str, str] = json.loads(found.metadata.get("weights", "{}"))
    folder = found.path.parent
    other = sorted(known.items() - _hash_weight_files(folder).items())
    if other:
        raise CheckpointError(
            f"{found.path} is of other weights than those in {other[0][0]} beside it, perhaps of "
            f"another run: delete {AVERAGE_FILE} and, if the model there was trained without an "
            f"average, {TRAINING_FILE}, and begin a new average with on_missing='begin'"
        )


def _load_average(ema: EMA, found: files.File) -> None:
    ema.load_state_dict(read_state(found, next(iter(ema.shadows[0].values()))))


def _load_training_weights(model: Any, folder: Path) -> None:
    """Load the training weights of a checkpoint whose model is the average, and only of such."""
    path = folder / TRAINING_FILE
    if not path.exists():
        return
    _check_weights_beside(files.read(path))  # the model may be of a later run, without an average
    weights = read_tensors(files.read(path), next(iter(model.parameters())))
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise CheckpointError(
            f"{path} holds weights that the model does not have:\n"
            + format_problems(repr(name) for name in unknown)
        )
