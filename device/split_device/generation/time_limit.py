"""Ends what takes too long in Python: a chat template is a program of the checkpoint, and may have no end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class _Late(BaseException):
    """Raised in a thread whose time is over. No `except Exception` on the way takes it for its own."""


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """Makes a call on this thread, and ends it if it takes longer, between two instructions of Python.

    It is a function, because the time may be over between a block and the end of its `with`.

    Args:
        seconds: of real time. One call into C is not interrupted.

    Raises:
        TimeoutError: the call took longer.
    """
    thread, lock, running = threading.get_ident(), threading.Lock(), True

    def interrupt() -> None:
        with lock:
            if running:
                # Taking one back would leave the interpreter looking for it at every call from then on.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Late))

    timer = threading.Timer(seconds, interrupt)
    timer.name, timer.daemon = "time-limit", True
    try:
        try:
            # It may be over before the call begins.
            timer.start()
            return call()
        finally:
            timer.cancel()
            with lock:
                running = False
            # One that has been sent and has not arrived yet would end what comes next. In a loop, it arrives.
            for _ in range(2):
                pass
    except _Late:
        raise TimeoutError(f"it took more than {seconds:g} seconds") from None
