"""A worker in a process of its own, for the tests that kill it. Says `ready`, and ends with its stdin."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fleet import start_worker
from split_common.system.process import collect_seldom

if __name__ == "__main__":
    collect_seldom()
    torch.set_num_threads(1)
    worker = start_worker(Path(sys.argv[1]), sys.argv[2])
    print("ready", flush=True)
    sys.stdin.read()
    worker.stop()
