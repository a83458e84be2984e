from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from split_common.system.process import python, running_command
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


def test_an_interrupt_that_has_no_effect_is_repeated() -> None:
    script = """
import signal, time
from split_common.system import signals

class Deaf:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

signals.REPEAT_INTERVAL = 0.01
stop = signals.catch_sigterm()
try:
    with signals.interrupt_on_sigterm():
        Deaf()
        time.sleep(60)
        print("went on")
except KeyboardInterrupt:
    print("interrupted", stop.is_set())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "interrupted True\n"


def test_a_command_looks_for_cycles_seldom_and_not_at_its_end() -> None:
    """Collections of the oldest objects: none while two hundred thousand come that stay, and none at the end."""
    script = """
import atexit, gc, sys
from split_common.cli import application as cli

class Cycle:
    def __init__(self):
        self.own = self
    def __del__(self):
        print("collected")

@cli.app.command()
def start():
    before = gc.get_stats()[2]["collections"]
    stays = [[] for _ in range(200_000)]
    print(gc.get_stats()[2]["collections"] - before, flush=True)
    Cycle()

cli.load_commands = lambda: None
if sys.argv[1] == "process":
    del sys.argv[1]
    cli.main()
else:
    cli.main(["start"])
"""

    def lines(*arguments: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    assert lines("process", "start") == ["0"]
    # As a call within another program it leaves that program's settings alone.
    collections, *end = lines("call")
    assert int(collections) > 0
    assert end == ["collected"]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if Python is started here and imports what lies in the current directory."""
    marker = tmp_path / "marker"
    (tmp_path / "here").mkdir()
    for name in ("msgspec", "json", "pip"):
        (tmp_path / "here" / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return marker


def test_children_import_nothing_from_the_current_directory(planted: Path) -> None:
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, facts):
        assert facts["address"].startswith("tcp://127.0.0.1:")
    done = subprocess.run(python("-c", "import json"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(python("-m", "pip", "--version"), capture_output=True, check=False)
    assert done.returncode != 3
    assert not planted.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="core dumps are forbidden in other ways elsewhere")
@pytest.mark.parametrize(("debug", "dumpable"), [("0", 0), ("1", 1)])
def test_commands_leave_no_core_dump(debug: str, dumpable: int) -> None:
    code = (
        "import ctypes, resource; from split_common.cli import main; assert main(['keys', 'show', '--json']) == 0;"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    env = {**os.environ, "LAMBDA_SPLIT_DEBUG": debug}
    done = subprocess.run(python("-c", code), env=env, capture_output=True, text=True, check=True)
    found = done.stdout.splitlines()[-1].split()
    assert found[0] == str(dumpable)
    assert dumpable or found[1] == "0"


def test_every_child_is_started_in_this_way() -> None:
    root = Path(__file__).parents[2]
    sources = [path for part in ("common", "broker", "worker", "device") for path in (root / part).rglob("*.py")]
    assert [path.name for path in sources if "sys.executable" in path.read_text()] == ["process.py"]


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
