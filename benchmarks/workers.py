"""Worker processes that are there in no time: forked from one that has imported all they need."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

from split_common.process import PARENT

#: What a worker imports.
_WORKER_IMPORTS = ["torch", "transformers", "transformers.models.llama.modeling_llama", "split_worker.worker"]


class Workers:
    """Workers of a model on a queue."""

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
        #: By the name that each has on the queue.
        self._running: dict[bytes, Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._running):
            self.kill(worker)

    def start(self) -> None:
        """Returns when the worker serves."""
        readable, writable = self._processes.Pipe(duplex=False)
        process = self._processes.Process(target=_serve, args=(self._command, writable), daemon=True)
        process.start()
        writable.close()
        with os.fdopen(os.dup(readable.fileno())) as lines:
            line = lines.readline()
        readable.close()
        if not line.startswith("{") or '"error"' in line:
            raise RuntimeError(f"a worker did not start: {line}")
        self._running[bytes.fromhex(json.loads(line)["id"])] = process

    def kill(self, worker: bytes) -> None:
        process = self._running.pop(worker)
        process.kill()
        process.join()


def _serve(command: list[str], ready: Any) -> None:
    """A worker's process."""
    from split_common.cli import main

    os.environ[PARENT] = str(os.getppid())
    with os.fdopen(os.dup(ready.fileno()), "w") as out, contextlib.redirect_stdout(out):
        ready.close()
        main(command)
