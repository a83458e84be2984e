"""Worker processes that start fast: they are forked from a process that has imported everything.

That process is this module, run as a script with the names of the modules to import as arguments. A line of JSON on
its stdin, the arguments of a `lambda-split` command, starts a worker; the answer is the line that the command
prints when it is ready. All workers are killed when stdin ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from split_common.system.signals import PARENT

#: Modules that every worker imports.
IMPORTS = ("torch", "transformers", "split_worker.cli", "split_worker.worker", "split_worker.bodies.loading")


class DidNotStart(RuntimeError):
    """A worker ended before it served. `error` is what it said: the error's type, and the message."""

    def __init__(self, line: str) -> None:
        super().__init__(f"a worker did not start: {line}")
        self.error = "DidNotStart", str(self)
        if line.startswith("{"):
            error = json.loads(line)["error"]
            self.error = error["type"], error["message"]


class Workers:
    """Starts and kills workers. A context manager, which kills the remaining ones.

    Args:
        options: options of `lambda-split worker` for all workers.
        imports: names of further modules to import before workers are forked.
    """

    def __init__(self, *options: str, imports: Sequence[str] = ()) -> None:
        self._command = ["worker", *options, "--threads", "1", "--kv-memory", "64MiB", "--json"]
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", *IMPORTS, *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        #: What each running worker said when it was ready, by its id on the queue.
        self.facts: dict[bytes, dict[str, Any]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.communicate()

    def start(self, *options: str) -> bytes:
        """Starts a worker with further options; returns its id once it serves. Raises DidNotStart if it fails."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps([*self._command, *options]) + "\n")
        self._parent.stdin.flush()
        line = self._parent.stdout.readline()
        if not line.startswith("{") or '"error"' in line:
            raise DidNotStart(line)
        facts = json.loads(line)
        worker = bytes.fromhex(facts["id"])
        self.facts[worker] = facts
        return worker

    def kill(self, worker: bytes) -> None:
        """SIGKILL."""
        os.kill(int(self.facts.pop(worker)["pid"]), signal.SIGKILL)


def main(imports: Sequence[str]) -> None:
    for name in imports:
        importlib.import_module(name)
    started: list[int] = []
    # Unbuffered: a child must not inherit what sys.stdin has buffered.
    with os.fdopen(0, "rb", buffering=0) as lines:
        while line := lines.readline():
            pid, answer = _fork(json.loads(line))
            started.append(pid)
            print(
                answer or json.dumps({"error": {"type": "", "message": "it ended before it was ready"}}), flush=True
            )
    # No child has been waited for, so no other process can have the id of one that has ended.
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork(command: list[str]) -> tuple[int, str]:
    """Starts a command; returns its process id and the first line that it prints, empty if it ends without one."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(readable)
            code = _run(command, writable)
        finally:
            # Without flushing and cleaning up what belongs to the parent.
            os._exit(code)
    os.close(writable)
    with os.fdopen(readable) as out:
        return pid, out.readline().strip()


def _run(command: list[str], writable: int) -> int:
    from split_common.cli import main

    os.environ[PARENT] = str(os.getppid())
    with os.fdopen(writable, "w") as out, contextlib.redirect_stdout(out):
        return main(command)


if __name__ == "__main__":
    main(sys.argv[1:])
