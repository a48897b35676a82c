"""The open scopes of the running task, and which of them the running code is inside.

A context variable holds them, so threads and asyncio tasks do not see each other's; a task or a thread that is started
with a copy of the context inherits what is open there. Generators have no context of their own: what one opens before
it yields would hold for whoever resumed it, so such a scope is passed over while its generator is suspended.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

# Of all encoders, innermost last. Never changed in place: copies of a context share the tuple.
_OPEN: ContextVar[tuple[Any, ...]] = ContextVar("covft_open_scopes", default=())
# Code that runs a generator up to its yield as the set-up of a block, and closes it afterwards.
_DRIVERS = ("contextlib", "_pytest", "pytest_asyncio", "anyio")
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Generator:
    """A generator that opened a scope, and the task that it ran in.

    Args:
        frame: The frame of the generator.
    """

    __slots__ = ("_frame", "_task")

    def __init__(self, frame: FrameType) -> None:
        self._frame: FrameType | None = frame
        self._task = _task()

    @classmethod
    def around_caller(cls) -> Generator | None:
        """Return the generator that the calling function, or the `with` block that called it, runs in.

        None if there is none, or if it is run as a context manager or as a fixture of pytest.
        """
        found, frame = None, sys._getframe(1)
        while frame is not None:
            driver = frame.f_globals.get("__name__", "").partition(".")[0] in _DRIVERS
            if driver or frame.f_code.co_name in ("__enter__", "__aenter__"):
                found = None
            elif frame.f_code.co_flags & _GENERATOR:
                found = frame if found is None else found
            else:
                break
            frame = frame.f_back  # type: ignore[assignment]
        return None if found is None else cls(found)

    def is_suspended(self) -> bool:
        """Return whether the caller runs beside the generator: in its task, while it is suspended or finished."""
        runs = self._frame is not None and self._frame.f_back is not None
        return not runs and self._task == _task()

    def finish(self) -> None:
        """Forget the frame; the generator counts as suspended for ever."""
        self._frame = None


class OpenScopes:
    """The open scopes of one encoder.

    The compiler cannot set a context variable. What is opened in compiled code is closed there too, so it is kept per
    thread, and is inside of everything that the context variable has.
    """

    def __init__(self) -> None:
        self._compiled = _Compiled()

    def open(self, scope: Any) -> None:
        """Add a scope, inside of all others."""
        scope.owner = self
        if not torch.compiler.is_compiling():
            scope.beside = tuple(other for other in self._of_task() if _is_suspended(other))
        if torch.compiler.is_compiling() or self._compiled.stack:
            self._compiled.stack.append(scope)
        else:
            _OPEN.set((*_OPEN.get(), scope))

    def close(self, scope: Any) -> None:
        """Remove a scope and the runs of the tower that an interrupt left open in it; no other scope is closed."""
        compiled = self._compiled.stack
        if compiled:
            compiled[:] = [other for other in compiled if other is not scope and other.parent is not scope]
            if torch.compiler.is_compiling():
                return
        opened = _OPEN.get()
        kept = tuple(other for other in opened if other is not scope and other.parent is not scope)
        if len(kept) < len(opened):
            _OPEN.set(kept)
        # A generator may be finished in a copy of its context, or in another one, as event loops do.
        if scope.generator is not None:
            scope.generator.finish()
        elif len(kept) == len(opened):
            scope.closed = True

    def innermost(self, wanted: Callable[[Any], bool] = lambda scope: True) -> Any:
        """Return the innermost open scope of a kind, whether the caller is inside of it or not; None without any."""
        for scope in reversed(self._compiled.stack):
            if wanted(scope):
                return scope
        return next((scope for scope in reversed(self._of_task()) if wanted(scope)), None)

    def inside_out(self) -> Iterator[Any]:
        """Yield the scopes that the caller may be inside of, innermost first."""
        yield from reversed(self._compiled.stack)
        running = [scope for scope in self._of_task() if not _is_suspended(scope)]
        for scope in reversed(running):
            # Generators that were suspended when it was opened, and have been resumed inside of it.
            yield from (other for other in reversed(scope.beside) if other in running)
            yield scope

    def has_suspended(self) -> bool:
        """Return whether scopes are passed over, because the generators that opened them are suspended."""
        return any(_is_suspended(scope) for scope in self._of_task())

    def _of_task(self) -> list[Any]:
        return [scope for scope in _OPEN.get() if scope.owner is self and not scope.closed]


class _Compiled(threading.local):
    """What compiled code has opened on one thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[Any] = []


def _is_suspended(scope: Any) -> bool:
    return scope.generator is not None and scope.generator.is_suspended()


def _task() -> tuple[int, int]:
    """Identify the thread and the asyncio task that run."""
    asyncio: Any = sys.modules.get("asyncio")
    task = None
    if asyncio is not None:
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no event loop runs
            pass
    return threading.get_ident(), id(task)
