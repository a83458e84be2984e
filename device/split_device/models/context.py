"""Values that are handed past a library's code, from around a call of it to a place inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class CallContext(Generic[T]):
    """What holds during a call of a library's code, in this thread (or asyncio task) alone. Calls may be nested.

    One is made at the top of a module, never per object: `contextvars` keep their variables.
    """

    def __init__(self, name: str) -> None:
        self._values: ContextVar[tuple[T, ...]] = ContextVar(name, default=())

    def get(self) -> T | None:
        """The value of the innermost call under way; None outside of any."""
        values = self._values.get()
        return values[-1] if values else None

    def enter(self, value: T) -> None:
        """A call begins, with this value."""
        self._values.set((*self._values.get(), value))

    def leave(self, value: T) -> None:
        """The call of this value ends, and all calls inside of it, however they ended. Else nothing changes."""
        values = self._values.get()
        for depth, entered in enumerate(values):
            if entered is value:
                self._values.set(values[:depth])
                return

    @contextmanager
    def entered(self, value: T) -> Iterator[T]:
        """Holds a value during a block."""
        self.enter(value)
        try:
            yield value
        finally:
            self.leave(value)
