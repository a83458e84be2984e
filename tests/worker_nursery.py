"""Workers in processes of their own, for the tests that kill them, forked by one that has imported everything.

A line of JSON on stdin, `[checkpoint, broker, cut, adapter]`, starts one and is answered by its process id. All end
with stdin.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import diffusers  # noqa: F401
import torch

from fleet import start_worker


def fork(checkpoint: str, broker: str, cut: str | None, adapter: str | None) -> int:
    """Starts a worker, and returns when it serves. Its process id; 0 if it failed."""
    waiting, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        worker = start_worker(Path(checkpoint), broker, cut=cut, ip_adapter=Path(adapter) if adapter else None)
        os.write(ready, b".")
        signal.pause()
        worker.stop()
    os.close(ready)
    serves = os.read(waiting, 1)
    os.close(waiting)
    return pid if serves else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    started = []
    for line in sys.stdin:
        started.append(fork(*json.loads(line)))
        print(started[-1], flush=True)
    for pid in filter(None, started):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
