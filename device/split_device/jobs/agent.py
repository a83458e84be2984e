"""The agent: a process that runs this user's jobs in the background."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from split_common.errors import AgentError
from split_common.system.files import private_dir, state_dir
from split_common.system.lock import holder
from split_common.system.process import python
from split_common.system.signals import PARENT

#: Bytes after which the log becomes `agent.log.1`, in place of an earlier one.
MAX_LOG = 4 * 1024 * 1024


def lock_path() -> Path:
    return state_dir() / "agent.lock"


def log_path() -> Path:
    return state_dir() / "agent.log"


def trim_log() -> None:
    """Moves the log to `agent.log.1` if it is longer than `MAX_LOG`. The agent goes on writing where it was."""
    path = log_path()
    with contextlib.suppress(OSError):
        if path.stat().st_size > MAX_LOG:
            with path.open("rb") as log, os.fdopen(_open_private(path.with_name("agent.log.1")), "wb") as old:
                shutil.copyfileobj(log, old)
            os.truncate(path, 0)


def logs_to_file() -> bool:
    """Whether this process's stderr is the log."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(2), log_path().stat())
    return False


def _open_private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CREAT | os.O_CLOEXEC, 0o600)


def running_agent() -> int | None:
    """The process id of this user's agent, or None if none runs."""
    return holder(lock_path())


def start(options: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Starts `lambda-split agent run` in the background; returns what it printed.

    Args:
        options: of the command. Other users of the machine can read them for as long as the agent runs.
        env: environment variables that it gets beside this process's own.

    Raises:
        AgentError: it did not start.
    """
    private_dir(state_dir())
    trim_log()
    log = os.open(log_path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            python("-m", "split_common", "--log-level", "info", "agent", "run", *options, "--json"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**{name: value for name, value in os.environ.items() if name != PARENT}, **env},
            start_new_session=True,
        )
    finally:
        os.close(log)
    assert process.stdout is not None
    with process.stdout as stdout:
        line = stdout.readline()
    facts: dict[str, Any] = msgspec.json.decode(line) if line.startswith(b"{") else {}
    if "pid" not in facts:
        process.wait()
        words = facts.get("error", {}).get("message", f"it ended without a message; see {log_path()}")
        raise AgentError(f"the agent did not start: {words}")
    return facts


def stop(timeout: float) -> int | None:
    """Stops the agent with SIGTERM; returns its process id, or None if none ran. Raises AgentError on time-out."""
    pid = running_agent()
    if not pid:
        return None
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while running_agent() == pid:
        if time.monotonic() > deadline:
            raise AgentError(f"the agent (process {pid}) has not ended after {timeout:g} s")
        time.sleep(0.05)
    return pid
