"""A moving average of weights for the Hugging Face ``Trainer``, which has none (transformers 5.23).

>>> from transformers import Trainer                                       # doctest: +SKIP
>>> from fastema.compat.transformers import EMACallback
>>> ema = EMACallback(decay=0.999)
>>> trainer = Trainer(model, args, callbacks=[ema], train_dataset=data)    # doctest: +SKIP
>>> trainer.train()                                                        # doctest: +SKIP
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from fastema.checkpoint import files
from fastema.checkpoint.state import read_state, write_state
from fastema.errors import ArgumentError, CheckpointError, StateError
from fastema.rules import Rule
from fastema.shadow import EMA

__all__ = ["EMACallback"]

AtEnd = Literal["average", "raw"]
OnMissing = Literal["raise", "begin"]

_FILE: Final = "ema.safetensors"
"""In the folder of each checkpoint."""


class EMACallback(TrainerCallback):  # type: ignore[misc]
    """Exponential moving average of the weights that a ``Trainer`` trains.

    ``avg += (1 - decay) * (x - avg)`` after each step of the optimizer, ``avg = x`` as training
    begins.

    Parameters
    ----------
    decay : float or rule, or a sequence of them
        See :class:`fastema.EMA`.
    evaluate_with_average : bool
        Whether ``evaluate`` and ``predict`` see the average, in training and after it.
    at_end : {"average", "raw"}
        What the model holds when ``train`` returns, and what ``trainer.save_model()`` saves then.
    on_missing : {"raise", "begin"}
        What is done where a run resumes from a checkpoint without an average: raise, or begin one
        with the weights of that checkpoint.
    which : int, optional
        Of several averages the one that is evaluated and given to the model.
    **options
        ``shadow_dtype``, ``rounding``, ``seed``, ``update_every``, ``start_after``, ``zero_debias``
        and the others of :class:`fastema.EMA`.

    Attributes
    ----------
    ema : fastema.EMA
        The average, from the beginning of ``train`` on.

    Raises
    ------
    ArgumentError
        For an argument without a valid value; for a model whose weights are sharded (FSDP, ZeRO-3).
    StateError
        As training begins, where the trainer cannot be found: see :meth:`attach`.
    CheckpointError
        Where a run resumes from a checkpoint that has no average, or one of another step.

    Notes
    -----
    **Evaluation.** The average changes places with the weights, in place and bit for bit, for as
    long as ``trainer.evaluation_loop`` runs, which ``evaluate`` and ``predict`` share, also with
    ``predict_with_generate`` and several data sets. The weights come back however it ends, Ctrl-C
    included. Events of ``on_evaluate`` and ``on_predict`` see the weights themselves again,
    ``on_prediction_step`` and ``compute_metrics`` the average.

    **Steps.** With gradient accumulation the average is updated once per step of the optimizer, not
    for each batch; not for a step that the scaler of float16 skips.

    **Checkpoints** have the weights in training where they always are, and the average in a file
    of its own beside them, ``ema.safetensors``, written whole or not at all. A run that resumes by
    ``train(resume_from_checkpoint=...)`` goes on to the bit. ``save_total_limit`` deletes the file
    with its folder. With ``push_to_hub`` a checkpoint is uploaded before the file is in it.

    **The best model** of ``load_best_model_at_end`` is the one whose average evaluated best.
    Weights and average are both taken from its checkpoint, and the model is given the one that
    ``at_end`` says. If that checkpoint has no average, a warning says so, and the model holds its
    weights.

    **A second** ``train`` begins a new average, with the weights that the model holds by then.

    **Several processes** (DDP) keep the same average each, and the one that saves saves it.
    """

    def __init__(
        self,
        decay: float | Rule | Sequence[float | Rule] = 0.9999,
        *,
        evaluate_with_average: bool = True,
        at_end: AtEnd = "average",
        on_missing: OnMissing = "raise",
        which: int | None = None,
        zero_debias: bool = False,
        **options: Any,
    ) -> None:
        for name, value, known in (
            ("at_end", at_end, get_args(AtEnd)),
            ("on_missing", on_missing, get_args(OnMissing)),
        ):
            if value not in known:
                raise ArgumentError(f"{name}={value!r}: expected one of {', '.join(known)}")
        # Refuses what it would refuse as training begins, but for what a GPU is needed to say.
        tried = {**options, "capturable": False}
        count = len(EMA([torch.zeros(1)], decay, zero_debias=zero_debias, **tried).shadows)
        if which not in range(-count, count) and (which is not None or count > 1):
            raise ArgumentError(
                f"which={which!r}: say by a number from 0 to {count - 1} which one of the averages "
                f"with decay={decay!r} is evaluated and given to the model"
            )
        self.evaluate_with_average = evaluate_with_average
        self.at_end = at_end
        self.on_missing = on_missing
        self._decay, self._options = decay, {"zero_debias": zero_debias, **options}
        self._which = which
        self._ema: EMA | None = None
        self._model: Any = None
        self._is_given = False
        self._resumed: str | None = None
        self._trainer: Callable[[], Any] = lambda: None

    @property
    def ema(self) -> EMA:
        """The average.

        Raises
        ------
        StateError
            Before training.
        """
        if self._ema is None:
            raise StateError("there is no average yet: it begins as trainer.train() does")
        return self._ema

    # -- the trainer -------------------------------------------------------------------------------

    def attach(self, trainer: Any) -> EMACallback:
        """Join a trainer that is there already, in place of ``trainer.add_callback``.

        Callbacks given as ``Trainer(callbacks=[...])`` do so by themselves.

        Parameters
        ----------
        trainer : transformers.Trainer

        Returns
        -------
        EMACallback
            This callback.

        Raises
        ------
        ArgumentError
            For what is no ``Trainer``.
        StateError
            If the trainer has another ``EMACallback`` already.
        """
        handler = getattr(trainer, "callback_handler", None)
        if handler is None or not hasattr(trainer, "evaluation_loop"):
            raise ArgumentError(
                f"attach({type(trainer).__name__}): expected a transformers.Trainer"
            )
        if self._trainer() is trainer:
            return self
        others = [one for one in handler.callbacks if one is not self]
        if any(isinstance(one, EMACallback) for one in others):
            raise StateError(
                "the trainer has an EMACallback already: for several averages give one callback "
                "several decays, decay=(0.99, 0.999)"
            )
        if len(others) == len(handler.callbacks):
            trainer.add_callback(self)
        self._trainer = weakref.ref(trainer)
        # There is no event at which an evaluation begins, or of one that fails, and no event says
        # what a run resumes from. An attribute of the instance comes before the class's method.
        trainer.evaluation_loop = partial(self._evaluated, trainer, trainer.evaluation_loop)
        trainer.train = partial(self._trained, trainer, trainer.train)
        return self

    def _found(self) -> Any:
        """The trainer, which does not give itself to its callbacks: it is who calls them."""
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if self._is_among(getattr(caller, "callback_handler", None)):
                self.attach(caller)
                return caller
            frame = frame.f_back
        return None

    def _is_among(self, handler: Any) -> bool:
        return any(one is self for one in getattr(handler, "callbacks", ()))

    def _trained(self, trainer: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``trainer.train``, with a note of what it resumes from."""
        resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if resumed is True:
            resumed = get_last_checkpoint(trainer.args.output_dir)
        self._resumed = resumed or None
        try:
            return inner(*args, **kwargs)
        finally:
            self._resumed = None

    def _evaluated(self, trainer: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``trainer.evaluation_loop``, with the average in the model."""
        here = trainer is self._trainer() and self._is_among(trainer.callback_handler)
        if not (here and self.evaluate_with_average and trainer.model is self._model):
            return inner(*args, **kwargs)
        given = trainer.args
        if not trainer.is_in_train and (given.fp16_full_eval or given.bf16_full_eval):
            # The loop would do so while the average is in the model, for good.
            dtype = torch.float16 if given.fp16_full_eval else torch.bfloat16
            self._model.to(dtype=dtype, device=given.device)
        with self.swapped():
            return inner(*args, **kwargs)

    # -- the average in the model ------------------------------------------------------------------

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """A block in which the model holds the average; its weights come back however it ends.

        Where the model holds the average already it does nothing.

        Raises
        ------
        StateError
            Before training.
        """
        if self._is_given or self.ema.applied:
            yield
            return
        with self.ema.swapped(which=self._which):
            yield

    def save_model(self, output_dir: str | None = None) -> None:
        """``trainer.save_model(output_dir)`` with the average in the place of the weights.

        Parameters
        ----------
        output_dir : str, optional
            By default that of the trainer's arguments.

        Raises
        ------
        StateError
            Before training.
        """
        with self.swapped():
            self._trainer().save_model(output_dir)

    # -- the Trainer's events ----------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the trainer."""
        self._found()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Begin the average, or go on with that of a checkpoint."""
        trainer = self._found() or self._trainer()
        if trainer is None and self.evaluate_with_average:
            raise StateError(
                "EMACallback does not find the trainer, whose evaluation is to see the average: "
                "call attach(trainer), or say evaluate_with_average=False"
            )
        if is_deepspeed_zero3_enabled() or getattr(trainer, "is_fsdp_enabled", False):
            raise ArgumentError(
                "EMACallback averages whole weights, and those of this model are sharded (FSDP or "
                "ZeRO-3); use DDP, or ZeRO up to stage 2"
            )
        if state.global_step and self._resumed is None:
            raise StateError(
                f"training resumes at step {state.global_step}, and EMACallback was not there to "
                "see from where: call attach(trainer) before train()"
            )
        self._ema = self._model = None  # frees its memory first
        self._is_given = False
        ema = EMA(model, self._decay, **self._options)
        if self._resumed is not None:
            self._take_up(ema, Path(self._resumed), state.global_step)
        self._ema, self._model = ema, model

    def _take_up(self, ema: EMA, folder: Path, step: int) -> None:
        path = folder / _FILE
        if not path.exists():
            if self.on_missing == "begin":
                return
            raise CheckpointError(
                f"{folder} has no {_FILE}: the run that it is of had no EMACallback; with "
                "on_missing='begin' the average begins with the weights of the checkpoint"
            )
        found = files.read(path)
        if found.metadata.get("step") != str(step):
            raise CheckpointError(
                f"{path} is the average of step {found.metadata.get('step', '?')}, and training "
                f"resumes at step {step}"
            )
        _load(ema, found)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train the average."""
        self._refuse_applied("is about to make a step")

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Take the weights into the average, if the optimizer has changed them."""
        if not getattr(optimizer, "step_was_skipped", False):
            self.ema.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average into the folder of the checkpoint."""
        self._refuse_applied("has saved a checkpoint")
        if args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            folder = Path(args.output_dir) / name
            if state.is_hyper_param_search:  # each trial has a folder of its own, the latest this
                tried = Path(args.output_dir).glob(f"*/{name}")
                folder = max(tried, key=lambda one: one.stat().st_mtime)
            saved = self.ema.state_dict(copy=False)
            write_state(folder / _FILE, saved, step=str(state.global_step))

    def _refuse_applied(self, what: str) -> None:
        if self._ema is not None and self._ema.applied:
            raise StateError(
                f"the trainer {what} while the average is in the model in the place of its "
                "weights: call ema.restore(), or leave the swapped() block, before"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model with the average, or with its weights."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None:
            path = Path(best) / _FILE
            if not path.exists():
                warnings.warn(
                    f"the best checkpoint, {best}, has no {_FILE}: the model holds its weights as "
                    "they were in training",
                    stacklevel=2,
                )
                self._is_given = True
                return
            _load(self.ema, files.read(path))
        if self.at_end == "average":
            self.ema.copy_to(self._model, which=self._which)
            self._is_given = True


def _load(ema: EMA, found: files.File) -> None:
    like = next(iter(ema.shadows[0].values()))
    ema.load_state_dict(read_state(found, like))
