"""Hands values past a library's code: from around a call to a place inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class CallContext(Generic[T]):
    """A value during a call of a library's code, for this thread (or asyncio task) only. Calls may be nested.

    Create one at the top of a module, never one per object: `contextvars` are never freed.
    """

    def __init__(self, name: str) -> None:
        self._values: ContextVar[tuple[T, ...]] = ContextVar(name, default=())

    def get(self) -> T | None:
        """The value of the innermost call; None outside of all calls."""
        values = self._values.get()
        return values[-1] if values else None

    def enter(self, value: T) -> None:
        """Begins a call with this value."""
        self._values.set((*self._values.get(), value))

    def leave(self, value: T) -> None:
        """Ends the call with this value, and all calls inside of it. Does nothing if there is none."""
        values = self._values.get()
        for depth, entered in enumerate(values):
            if entered is value:
                self._values.set(values[:depth])
                return

    @contextmanager
    def entered(self, value: T) -> Iterator[T]:
        """Sets a value for a block."""
        self.enter(value)
        try:
            yield value
        finally:
            self.leave(value)
