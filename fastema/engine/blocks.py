"""Blocks that put something back at their end, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastema.engine.interrupts import defer_signals

__all__ = ["RestoringBlock", "Steps"]

Value = TypeVar("Value")


def _check_nothing() -> None:
    """Verify nothing."""


@dataclass(frozen=True)
class Steps(Generic[Value]):
    """The steps of a :class:`RestoringBlock`.

    ``apply`` runs with signals held back as the block begins and returns what ``with ... as``
    names. ``restore`` undoes it, exactly once, with signals held back; it also runs where ``apply``
    raised, so it has to look what there is to undo. ``verify`` runs after that if nothing was
    raised so far; what it raises comes out of the block.
    """

    apply: Callable[[], Value]
    restore: Callable[[], object]
    verify: Callable[[], object] = _check_nothing


class RestoringBlock(ContextDecorator, Generic[Value]):
    """A ``with`` block whose end undoes its beginning, however it ends.

    Parameters
    ----------
    prepare : callable
        Makes the :class:`Steps` as the block is entered. It does all checks and writes nothing: an
        exception, or an interrupt, leaves everything as it was.

    Raises
    ------
    RuntimeError
        If it is entered twice.

    Notes
    -----
    Python runs signal handlers as a function begins, after a call returns and at the end of a
    loop's round, and they may raise there. That leaves two gaps around a ``with`` block:

    - ``__exit__`` may be interrupted before its first instruction, where no ``try`` is in force
      yet. This holds for every ``__exit__`` in Python, and so for ``contextlib.contextmanager``.
      Functions in C have no such moment. Here ``__exit__`` is ``min(..., key=generator.send)``, a
      function in C that takes any arguments and calls one of them: it resumes a generator, which is
      inside its own ``try`` when the first handler can run.
    - A call that is to restore may be interrupted as it begins. Nothing was restored then, so it is
      called again; what raised goes on afterwards. Three calls outlast three signals in a row.

    ``__enter__`` is in Python, with a ``try`` around all that follows ``prepare``. Signals that
    arrive during ``apply`` or ``restore`` wait: :class:`~fastema.engine.interrupts.defer_signals`.
    """

    def __init__(self, prepare: Callable[[], Steps[Value]]) -> None:
        self._prepare = prepare
        self._run = _run(prepare)
        self._entered = False

    def _recreate_cm(self) -> RestoringBlock[Value]:
        """A block for each call of a decorated function."""
        return RestoringBlock(self._prepare)

    def __enter__(self) -> Value:
        """Apply; restore if anything is raised before the block has begun."""
        if self._entered:
            raise RuntimeError("this block was entered before: ask for another one")
        self._entered = True
        try:
            value: Value = next(self._run)
            return value  # inside: what comes after the call is caught too
        except BaseException:
            self._run.close()
            raise

    def close(self) -> None:
        """End a block that was entered by hand; may be called again, after an interrupt too."""
        self._run.close()

    if TYPE_CHECKING:

        def __exit__(self, *_: object) -> None: ...

    else:

        class _Exit:
            def __get__(self, block, owner=None):
                if block is None:  # asked of the class, as contextlib.ExitStack does
                    return lambda self, *raised: self.__exit__(*raised)
                return partial(min, "", key=block._run.send)

        __exit__ = _Exit()


def _run(prepare: Callable[[], Steps[Value]]) -> Generator[Any, Any, None]:
    """Yield what the block names; then answer ``min``: first restore, then see what was raised.

    ``min`` sends the empty string, the type of the block's exception or None, and two more. Equal
    keys make it return the first, which is false: the exception goes on.
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
    del steps, value  # a block that is kept does not keep what it was of
    while True:
        yield 0
