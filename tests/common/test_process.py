from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from split_common.system.signals import wait_until_set


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_process_is_being_started_ends_that_too(number: int, code: int) -> None:
    script = f"""
import contextlib, signal, subprocess, sys
from split_common.system import process, signals

class Interrupted(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)
        signal.raise_signal({int(number)})

subprocess.Popen = Interrupted
try:
    with signals.exit_on_sigterm(), process.started(["sleep", "60"], subprocess.DEVNULL, None):
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
    wait_until_set(Stop())
    assert 0 < max(waits) <= 1.0


def test_the_tests_pass_wherever_they_are_started(tmp_path: Path) -> None:
    """In a job in the background, by cron, in a container: signals ignored or blocked, no stdin, anywhere."""
    script = f"""
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT, signal.SIGTERM}})
os.close(0)
tests = "{Path(__file__)}::{test_a_signal_while_a_process_is_being_started_ends_that_too.__name__}"
os.execv(sys.executable, [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tests])
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
