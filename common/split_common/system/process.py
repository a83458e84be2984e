"""Processes of commands that run long, and of those that start them: settings, signals, children."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from split_common.errors import SplitError

#: Seconds that a process may take to end after SIGTERM.
STOP_TIMEOUT = 10.0

#: Environment variable of processes that `running_command` starts: the process id of their parent.
PARENT = "LAMBDA_SPLIT_PARENT"

#: Seconds between two looks at signals, and at whether the parent still runs.
LOOK_INTERVAL = 1.0

#: glibc's names for two of its limits (mallopt(3)), and their values in bytes: freed memory above the first goes
#: back to the system, and what is larger than the second is mapped by itself and always goes back.
TRIM_THRESHOLD = -1, 32 * 1024 * 1024
MMAP_THRESHOLD = -3, 8 * 1024 * 1024

#: Exit code of a process that SIGTERM ended: 128 + SIGTERM, as shells have it.
EXIT_TERMINATED = 143


#: How often an idle OpenMP thread looks for work before it sleeps (libgomp): longer than the gap between two
#: layers, which makes a forward up to a third faster, and too short to slow other processes down.
SPIN_COUNT = "1000"


def passive_threads() -> None:
    """Lets idle OpenMP threads sleep: several processes that spin on few cores slow each other down.

    Must be called before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def reuse_memory() -> None:
    """Lets the buffers of large messages be used again: mapping a new megabyte costs more than encrypting it.

    For whole processes of ours; a library does not change how its host allocates. Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for limit in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            libc.mallopt(*limit)


def use_loopback_keys(empty: Path) -> None:
    """Makes this process, and those that it starts, use the keys of this machine's loopback, whatever is set.

    Args:
        empty: a directory without settings.
    """
    os.environ["LAMBDA_SPLIT_KEYS"] = ""
    os.environ["LAMBDA_SPLIT_CONFIG"] = str(empty)


def catch_sigterm() -> threading.Event:
    """From now on SIGTERM only sets the event. A command calls this before it says that it is ready."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


@contextlib.contextmanager
def breakable() -> Iterator[None]:
    """Lets SIGTERM raise KeyboardInterrupt as well where `catch_sigterm` catches it: for work that takes long."""
    caught = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(caught):
        yield
        return

    def break_off(number: int, frame: FrameType | None) -> None:
        caught(number, frame)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, break_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, caught)


def wait_for(stop: threading.Event) -> None:
    """Returns when the event is set.

    Raises:
        KeyboardInterrupt: by Ctrl-C; also in a process that `running_command` started, once its parent is gone.
    """
    parent = int(os.environ.get(PARENT, "0"))
    # A signal that comes just before a wait begins is seen only when that wait ends, so each one is short.
    while not stop.wait(LOOK_INTERVAL):
        if parent and os.getppid() != parent:
            raise KeyboardInterrupt


@contextlib.contextmanager
def running_command(
    arguments: Sequence[str], log: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Runs a `lambda-split` command that prints one JSON object when it is ready; ends it on leaving.

    SIGTERM ends this process in an orderly way meanwhile. Ctrl-C in a terminal reaches this process alone, which
    then ends the other.

    Args:
        arguments: the command and its options; `--json` is added.
        log: a file to which its stderr is appended; this process's own stderr if None.
        env: further environment variables.

    Yields:
        The process and the object that it printed.

    Raises:
        SplitError: it ended before it was ready; the message is its own.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(exit_on_sigterm())
        stderr = stack.enter_context(log.open("ab")) if log is not None else None
        process = stack.enter_context(
            started(
                [sys.executable, "-m", "split_common", *arguments, "--json"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(env or {}), PARENT: str(os.getpid())},
            )
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = json.loads(line) if line.startswith("{") else {}
        if "error" in ready or not ready:
            words = ready.get("error", {}).get("message", "it ended without a word")
            raise SplitError(f"lambda-split {arguments[0]}: {words}")
        yield process, ready


@contextlib.contextmanager
def started(
    command: Sequence[str],
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int | None,
    env: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Runs a process in a session of its own, out of reach of Ctrl-C, and ends it on leaving."""
    with contextlib.ExitStack() as stack:
        # An exception between the fork and the callback would leave a process that is never ended.
        with _signals_held_back():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                text=True,
                env=env,
                start_new_session=True,
            )
            stack.callback(stop_process, process)
        yield process


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Delays SIGINT and SIGTERM until its end, where their handlers could raise exceptions."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SIGTERM's handler is restored first: if SIGINT raises before its own is, the process ends all the same.
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    came: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for sent in came:
            signal.raise_signal(sent)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that child processes are ended; only where it has no handler yet."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(*_: object) -> None:
    raise SystemExit(EXIT_TERMINATED)


def stop_process(process: subprocess.Popen[str]) -> None:
    """Ends a process that this one started, politely first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        except BaseException:
            # A second Ctrl-C: no more patience.
            process.kill()
            process.wait()
            raise
    if process.stdout is not None:
        process.stdout.close()
