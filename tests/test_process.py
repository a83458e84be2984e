from __future__ import annotations

import signal
import subprocess
import sys
import threading

import psutil
import pytest

from split_common.process import wait_for


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_process_is_being_started_ends_that_too(number: int, code: int) -> None:
    script = f"""
import contextlib, signal, subprocess, sys
from split_common import process

class Interrupted(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)
        signal.raise_signal({int(number)})

subprocess.Popen = Interrupted
try:
    with process.exit_on_sigterm(), process.started(["sleep", "60"], subprocess.DEVNULL, None):
        print("went on")
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert not psutil.pid_exists(int(done.stdout))


def test_no_wait_is_without_end() -> None:
    """A signal that comes between the interpreter's last look and the system call is seen when the call ends."""

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return len(waits) > 1

    waits: list[float] = []
    wait_for(Stop())
    assert 0 < max(waits) <= 1.0
