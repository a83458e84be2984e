"""What the long-running commands and those that start them share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from split_common.errors import SplitError

#: Seconds that a process may take to end after SIGTERM.
STOP_TIMEOUT = 10.0


def passive_threads() -> None:
    """Lets idle OpenMP threads sleep: several processes that spin on few cores slow each other down.

    Must be called before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def wait_for_sigterm() -> None:
    """Returns after SIGTERM; Ctrl-C raises KeyboardInterrupt as ever."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()


@contextlib.contextmanager
def running_command(
    arguments: Sequence[str], log: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Runs a `lambda-split` command that prints one JSON object when it is ready; ends it on leaving.

    Args:
        arguments: the command and its options; `--json` is added.
        log: where its stderr goes; this process's own if None.
        env: further environment variables.

    Yields:
        The process and the object that it printed.

    Raises:
        SplitError: it ended before it was ready; the message is its own.
    """
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(log.open("wb")) if log is not None else None
        process = subprocess.Popen(
            [sys.executable, "-m", "split_common", *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **(env or {})},
        )
        stack.callback(stop_process, process)
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = json.loads(line) if line.startswith("{") else {}
        if "error" in ready or not ready:
            words = ready.get("error", {}).get("message", "it ended without a word")
            raise SplitError(f"lambda-split {arguments[0]}: {words}")
        yield process, ready


def stop_process(process: subprocess.Popen[str]) -> None:
    """Ends a process that this one started, politely first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
