"""Context managers that undo their effect on exit, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
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


class RestoringBlock(ContextDecorator, Generic[Value]):
    """A ``with`` block that undoes its effect on exit, also after an exception or an interrupt.

    Parameters
    ----------
    prepare : callable
        Called on entry; returns the :class:`BlockSteps`. It does all checks and writes nothing, so
        that an exception or an interrupt in it leaves everything unchanged.

    Raises
    ------
    RuntimeError
        If the block is entered twice.

    Notes
    -----
    Python runs signal handlers when a function begins, after a call returns and at the end of a
    loop iteration, and a handler may raise there. That leaves two gaps around a ``with`` block:

    - ``__exit__`` may be interrupted before its first instruction, when no ``try`` is in force
      yet. This holds for every ``__exit__`` written in Python, and so for
      ``contextlib.contextmanager``. C functions have no such gap. Here ``__exit__`` is
      ``min(..., key=generator.send)``, a C function that takes any arguments: it resumes a
      generator, which is inside its own ``try`` when the first handler can run.
    - A call of ``restore`` may be interrupted as it begins. Nothing was restored then, so it is
      called again, and the exception propagates afterwards. Three calls survive three signals in
      a row.

    ``__enter__`` is written in Python, with a ``try`` around everything after ``prepare``. Signals
    that arrive during ``apply`` or ``restore`` wait; see
    :class:`~fastema.engine.interrupts.defer_signals`.
    """

    def __init__(self, prepare: Callable[[], BlockSteps[Value]]) -> None:
        self._prepare = prepare
        self._run = _run(prepare)
        self._entered = False

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
            self._run.close()
            raise

    def close(self) -> None:
        """Exit a block that was entered by hand. May be called again, also after an interrupt."""
        self._run.close()

    if TYPE_CHECKING:

        def __exit__(self, *_: object) -> None: ...

    else:

        class _Exit:
            def __get__(self, block, owner=None):
                if block is None:  # looked up on the class, as contextlib.ExitStack does
                    return lambda self, *raised: self.__exit__(*raised)
                return partial(min, "", key=block._run.send)

        __exit__ = _Exit()


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
            if due:
                due.pop()()

    try:
        try:
            try:
                with defer_signals():
                    due.append(steps.restore)
                    value = steps.apply()
                yield value
            finally:
                restore()
        finally:
            restore()
    finally:
        restore()
    if (yield 0) is None:
        steps.verify()
    del steps, value  # a block that stays alive must not keep their tensors alive
    while True:
        yield 0
