"""Context managers that undo their effect on exit, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastema.engine.interrupts import defer_signals

__all__ = ["BlockSteps", "RestoringBlock"]

Value = TypeVar("Value")


def _check_nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class BlockSteps(Generic[Value]):
    """The callables that a :class:`RestoringBlock` runs.

    ``apply`` runs on entry, with signals deferred, and returns the value for ``with ... as``.
    ``restore`` undoes ``apply`` exactly once, with signals deferred. It also runs if ``apply``
    raised, so it must check what there is to undo. ``verify`` runs last, if nothing was raised so
    far; its exceptions leave the block.
    """

    apply: Callable[[], Value]
    restore: Callable[[], object]
    verify: Callable[[], object] = _check_nothing


class _CallableProperty(property):
    """A property that :class:`contextlib.ExitStack` can use: it calls ``type(block).__exit__``."""

    def __call__(self, block: Any, *raised: Any) -> object:
        return block.__exit__(*raised)


class RestoringBlock(ContextDecorator, Generic[Value]):
    """A ``with`` block that undoes its effect on exit, also after an exception or an interrupt.

    It restores wherever a signal handler raises, even as ``__exit__`` begins. Signals that arrive
    during ``apply`` or ``restore`` wait; see :class:`~fastema.engine.interrupts.defer_signals`.

    Parameters
    ----------
    prepare : callable
        Called on entry; returns the :class:`BlockSteps`. It does all checks and writes nothing, so
        that an exception or an interrupt in it leaves everything unchanged.

    Raises
    ------
    RuntimeError
        If the block is entered twice.
    """

    def __init__(self, prepare: Callable[[], BlockSteps[Value]]) -> None:
        self._prepare = prepare
        self._run = _run(prepare)
        self._exit = partial(min, "", key=self._run.send)
        self._entered = False
        self.close: Callable[[], None] = self._run.close
        """Exit a block that was entered by hand. May be called again."""

    def _recreate_cm(self) -> RestoringBlock[Value]:
        """Return a new block for each call of a decorated function."""
        return RestoringBlock(self._prepare)

    def __enter__(self) -> Value:
        """Call ``apply``; call ``restore`` if anything is raised before the block's body starts."""
        if self._entered:
            raise RuntimeError("this block was already entered: create a new one")
        self._entered = True
        try:
            value: Value = next(self._run)
            return value  # inside the try: a signal after the call is caught too
        except BaseException:
            self.close()
            raise

    if TYPE_CHECKING:

        def __exit__(self, *_: object) -> None: ...

    else:
        # A signal handler may raise before the first instruction of any Python function, also of
        # __exit__. Hence __exit__ is a C function that takes any arguments: min. Its key resumes
        # a generator, which is inside a try already.
        __exit__ = _CallableProperty(attrgetter("_exit"))


def _run(prepare: Callable[[], BlockSteps[Value]]) -> Generator[Any, Any, None]:
    """Yield the value of ``apply``; restore at the first ``send``, verify at the second.

    ``min`` sends the empty string, the type of the block's exception or None, and two more
    arguments. Equal keys make it return the first argument, which is false: an exception
    propagates.
    """
    steps = prepare()
    due: list[Callable[[], object]] = []

    def restore() -> None:
        with defer_signals():
            due.pop()()

    # A call may be interrupted as it begins. Three calls survive two signals that arrive together.
    try:
        try:
            try:
                with defer_signals():
                    due.append(steps.restore)
                    value = steps.apply()
                yield value
            finally:
                if due:
                    restore()
        finally:
            if due:
                restore()
    finally:
        if due:
            restore()
    if (yield 0) is None:
        steps.verify()
    del steps, value, restore  # a block that stays alive must not keep their tensors alive
    while True:
        yield 0
