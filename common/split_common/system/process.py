"""Settings of long-running processes, and commands that run as child processes."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from split_common.errors import SplitError
from split_common.system.signals import PARENT, delay_signals, exit_on_sigterm

#: Seconds that a process may take to end after SIGTERM.
STOP_TIMEOUT = 10.0

#: Two limits of glibc's allocator (mallopt(3)): the number of each, and its value in bytes. Free memory above the
#: first goes back to the system. Blocks above the second are mapped separately, and go back when they are freed.
TRIM_THRESHOLD = -1, 32 * 1024 * 1024
MMAP_THRESHOLD = -3, 8 * 1024 * 1024

#: Times that an idle OpenMP thread (libgomp) looks for work before it sleeps. It takes longer than the gap between
#: two layers, which makes a forward up to a third faster, and is too short to slow other processes down.
SPIN_COUNT = "1000"


#: Arguments of `gc.set_threshold`: a collection of the youngest objects after so many new ones that stay, and how
#: many collections of one generation come before one of the next. Importing torch and transformers makes very many
#: objects, all of which stay: with Python's own limits, a tenth of a command's start went to collections in vain.
GC_THRESHOLDS = 10_000, 10, 10

#: Operation of prctl(2).
PR_SET_DUMPABLE = 4


def passive_threads() -> None:
    """Makes idle OpenMP threads sleep: several processes that spin on few cores slow each other down.

    Call it before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def keep_memory_private() -> None:
    """Keeps keys and prompts out of core dumps, and other processes of this user out of this one's memory.

    For commands only. Debuggers and profilers cannot attach either, unless `LAMBDA_SPLIT_DEBUG` is 1. Outside Linux
    it only forbids core dumps.
    """
    if os.environ.get("LAMBDA_SPLIT_DEBUG") == "1":
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit does not concern a program that the system pipes core dumps to.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def reuse_memory() -> None:
    """Makes malloc keep the buffers of large messages: mapping a new megabyte costs more than encrypting it.

    For commands only: a library must not change the allocator of its host process. Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for limit in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            libc.mallopt(*limit)


def collect_seldom() -> None:
    """Makes Python look for unreachable cycles less often, and not at all when the process ends.

    For commands only, before they import torch: a command starts and ends with a quarter less CPU time. What the
    process must do before it ends does not wait for a destructor.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    # What is frozen is left out of collections. The interpreter makes several after the last line of a program.
    atexit.register(gc.freeze)


def leave_out_of_collections() -> None:
    """Leaves all objects that are there out of Python's search for unreachable cycles.

    For commands that have loaded what they keep: among a million objects, one search takes half a second, in which
    no other thread runs.
    """
    gc.collect()
    gc.freeze()


def python(*arguments: str) -> list[str]:
    """The command line that runs this Python in a child process, e.g. with `-m` and a module.

    Without `-P`, `-m` and `-c` import from the current directory first, which may hold anybody's files.
    """
    return [sys.executable, "-P", *arguments]


def allow_many_files() -> None:
    """Raises the limit on this process's open files, connections included, as far as it may. For commands only."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def use_loopback_keys(empty: Path) -> None:
    """Makes this process, and those that it starts, use the loopback fleet, whatever keys are configured.

    Args:
        empty: a directory without settings.
    """
    os.environ["LAMBDA_SPLIT_KEYS"] = ""
    os.environ["LAMBDA_SPLIT_CONFIG"] = str(empty)


@contextlib.contextmanager
def running_command(
    arguments: Sequence[str], log: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Runs a `lambda-split` command that prints one JSON object when it is ready; ends it after the block.

    Within the block SIGTERM raises SystemExit. Ctrl-C in a terminal reaches this process only, which then ends the
    other one.

    Args:
        arguments: the command and its options; `--json` is added.
        log: a file to which its stderr is appended; this process's own stderr if None.
        env: further environment variables.

    Yields:
        The process and the object that it printed.

    Raises:
        SplitError: the command ended before it was ready; the message is the command's own.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(exit_on_sigterm())
        stderr = stack.enter_context(log.open("ab")) if log is not None else None
        process = stack.enter_context(
            started(
                python("-m", "split_common", *arguments, "--json"),
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(env or {}), PARENT: str(os.getpid())},
            )
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = json.loads(line) if line.startswith("{") else {}
        if "error" in ready or not ready:
            message = ready.get("error", {}).get("message", "it ended without a message")
            raise SplitError(f"lambda-split {arguments[0]}: {message}")
        yield process, ready


@contextlib.contextmanager
def started(
    command: Sequence[str],
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int | None,
    env: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Runs a process in a new session, which Ctrl-C does not reach; ends it after the block."""
    with contextlib.ExitStack() as stack:
        # After an exception between the fork and the callback nothing would end the process.
        with delay_signals():
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


def stop_process(process: subprocess.Popen[str]) -> None:
    """Ends a child process: by SIGTERM, and by SIGKILL after `STOP_TIMEOUT`. Closes its stdout."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        except BaseException:
            # A second Ctrl-C: do not wait any longer.
            process.kill()
            process.wait()
            raise
    if process.stdout is not None:
        process.stdout.close()
