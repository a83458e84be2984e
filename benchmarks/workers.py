"""Worker processes that are there in no time: forked from one that has imported all they need."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

from split_common.process import PARENT

#: What a worker imports.
_WORKER_IMPORTS = ["torch", "transformers", "transformers.models.llama.modeling_llama", "split_worker.worker"]


class Workers:
    """Workers of a model on a queue, the oldest first."""

    def __init__(self, model: Path, address: str) -> None:
        self._command = [
            "worker",
            "--model",
            str(model),
            "--broker",
            address,
            "--dtype",
            "float32",
            "--threads",
            "1",
        ]
        self._command += ["--kv-memory", "64MiB", "--json"]
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(_WORKER_IMPORTS)
        self._running: list[Any] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        while self._running:
            self.kill_oldest()

    def start(self) -> None:
        """Returns when the worker serves."""
        readable, writable = self._processes.Pipe(duplex=False)
        process = self._processes.Process(target=_serve, args=(self._command, writable), daemon=True)
        process.start()
        self._running.append(process)
        writable.close()
        with os.fdopen(os.dup(readable.fileno())) as lines:
            line = lines.readline()
        readable.close()
        if not line.startswith("{") or '"error"' in line:
            raise RuntimeError(f"a worker did not start: {line}")

    def kill_oldest(self) -> None:
        process = self._running.pop(0)
        process.kill()
        process.join()


def _serve(command: list[str], ready: Any) -> None:
    """A worker's process."""
    from split_common.cli import main

    os.environ[PARENT] = str(os.getppid())
    with os.fdopen(os.dup(ready.fileno()), "w") as out, contextlib.redirect_stdout(out):
        ready.close()
        main(command)
