"""What SIGTERM and Ctrl-C do to a command: set an event, interrupt, exit, or wait until a block has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

#: Environment variable with the process id of the parent, in processes that `process.running_command` starts.
PARENT = "LAMBDA_SPLIT_PARENT"

#: Seconds between two checks for a signal, and for the end of the parent process.
POLL_INTERVAL = 1.0

#: Seconds after which an interrupt is repeated, if the block goes on.
REPEAT_INTERVAL = 2.0

#: Exit code of a process that SIGTERM ended: 128 + SIGTERM, as in shells.
EXIT_TERMINATED = 143


def catch_sigterm() -> threading.Event:
    """From now on SIGTERM only sets the event. A command calls this before it says that it is ready."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


def wait_until_set(stop: threading.Event) -> None:
    """Returns when the event is set.

    Raises:
        KeyboardInterrupt: on Ctrl-C, or if a process that `process.running_command` started has lost its parent.
    """
    parent = int(os.environ.get(PARENT, "0"))
    # A signal that comes just before a wait begins is handled only when that wait ends, so each one is short.
    while not stop.wait(POLL_INTERVAL):
        if parent and os.getppid() != parent:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """After `catch_sigterm`, makes SIGTERM also raise KeyboardInterrupt within a block that takes long.

    It is raised again and again until the block ends, because what is raised within a destructor has no effect.

    Does nothing on other threads than the main one, or if SIGTERM has no handler.
    """
    caught = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(caught):
        yield
        return

    main, over = threading.get_ident(), threading.Event()
    repeating = threading.Thread(
        target=_repeat_sigterm, args=(main, over), name="lambda-split-sigterm", daemon=True
    )

    def interrupt(number: int, frame: FrameType | None) -> None:
        caught(number, frame)
        if repeating.ident is None:
            repeating.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, caught)


def _repeat_sigterm(thread: int, over: threading.Event) -> None:
    while not over.wait(REPEAT_INTERVAL):
        signal.pthread_kill(thread, signal.SIGTERM)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit within a block, so that the block ends its child processes.

    Does nothing on other threads than the main one, or if SIGTERM has a handler or is ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(*_: object) -> None:
    raise SystemExit(EXIT_TERMINATED)


@contextlib.contextmanager
def delay_signals() -> Iterator[None]:
    """Handles SIGINT and SIGTERM only after a block, so that their handlers raise no exception within it.

    Does nothing on other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SIGTERM's handler is restored first: if SIGINT raises before its own is, the process ends all the same.
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    delayed: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: delayed.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for sent in delayed:
            signal.raise_signal(sent)
