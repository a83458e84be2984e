"""Runs each mode of a hostile member for a slice of the time, and a bystander for another one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import psutil

from split_common.system.console import stderr
from split_common.system.process import running_command
from split_common.transport.base import GRACE, HEARTBEAT
from split_device.stress.hostile.modes import MODES
from split_device.stress.hostile.outcome import HostileOutcome, ModeOutcome, Peaks, Window
from split_device.stress.ledger import Ledger
from split_device.stress.plan import StressPlan
from split_device.stress.processes import DeviceProcess, Supervised

#: Length of a slice by default, in seconds.
SLICE = 10.0

#: Longest time, in seconds, to wait at the start until each device has got an answer.
WARM_UP = 180.0

#: Seconds between the end of a slice and the next one: the fleet notices that the hostile member is gone.
SETTLE = GRACE + HEARTBEAT

#: Seconds that the process of a mode may take to say what it has done.
END_TIMEOUT = 20.0

#: Refreshes the view and waits a moment; returns whether some device still runs.
Update = Callable[[], bool]


class Starts(Protocol):
    """Says what to start for a slice: the words of a command, and its environment."""

    def mode(self, name: str) -> tuple[list[str], dict[str, str]]: ...

    def bystander(self, cores: float) -> tuple[list[str], dict[str, str]]: ...


class Slices:
    """Runs the modes, one after another.

    Args:
        plan: its modes, and the seconds of all slices together; `SLICE` each if it has none.
        ledger: of the honest devices.
        fleet: the processes whose memory is bounded.
        devices: honest ones.
        commands: of the processes of slices.
        log: a file for what these processes print on stderr.
    """

    def __init__(
        self,
        plan: StressPlan,
        ledger: Ledger,
        fleet: list[Supervised],
        devices: list[DeviceProcess],
        commands: Starts,
        log: Path,
    ) -> None:
        self._plan = plan
        self._seconds = SLICE if plan.seconds is None else plan.seconds / (2 * len(plan.hostile))
        self._ledger = ledger
        self._fleet = fleet
        self._devices = devices
        self._commands = commands
        self._log = log
        # Processes whose memory is above its bound.
        self._above: list[Supervised] = []
        self.outcome = HostileOutcome({}, Peaks())

    def run(self, update: Update) -> None:
        """Runs all modes, or those that there is time for until all devices have ended."""
        self._wait(WARM_UP, update, lambda: self._ledger.devices_answered >= len(self._devices))
        self.outcome.memory.sample(self._fleet)
        for name in self._plan.hostile:
            stderr.print(f"hostile: {name}", soft_wrap=True)
            self.outcome.modes[name] = self._mode(name, update)
            if all(device.finished for device in self._devices):
                return

    def _mode(self, name: str, update: Update) -> ModeOutcome:
        crashes, failures = self._crashes(), self._ledger.failures
        # In a mixed fleet those count whose model is attacked: a step of an image takes as long as many tokens.
        honest = [index for index in range(self._plan.devices) if self._plan.kind(index) == MODES[name].kind]
        with self._process(*self._commands.mode(name)) as process:
            hostile = self._slice(process, update)
            counts, failure = _last_words(process)
        exceeded = self._above[0].name if self._above else None
        for each in self._above:
            # As the system would do in the end: the next mode finds one that has started again.
            each.kill()
        self._wait(SETTLE, update)
        with self._process(*self._commands.bystander(hostile.cores)) as process:
            bystander = self._slice(process, update)
            _last_words(process)
        return ModeOutcome(
            hostile,
            bystander,
            hostile.throughput(self._ledger, honest),
            bystander.throughput(self._ledger, honest),
            lost=self._ledger.failures - failures,
            crashed=self._crashes() - crashes,
            acts=counts.pop("acts", 0),
            refused=counts,
            failure=failure,
            exceeded=exceeded,
        )

    def _crashes(self) -> int:
        return sum(each.crashes for each in self._fleet)

    @contextlib.contextmanager
    def _process(self, words: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
        """A process that is ready. What it starts up with is not part of a slice."""
        with running_command(words, self._log, env) as (process, _):
            yield process

    def _slice(self, process: subprocess.Popen[str], update: Update) -> Window:
        """One slice beside a process. It ends as soon as some memory exceeds its bound."""
        cpu, began = cpu_seconds(process.pid), time.monotonic()
        self._above = []
        self._wait(self._seconds, update, lambda: bool(self._above))
        ended = time.monotonic()
        since = self._ledger.began
        return Window(began - since, ended - since, cpu_seconds(process.pid) - cpu)

    def _wait(self, seconds: float, update: Update, enough: Callable[[], bool] = lambda: False) -> None:
        """Lets time pass until it is enough, or all devices have ended. Samples memory meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not enough() and update():
            if self.outcome.memory.peaks:
                self._above = self.outcome.memory.sample(self._fleet)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children, those that run and those that have ended."""
    try:
        running = [psutil.Process(pid), *_children(pid)]
        times = [each.cpu_times() for each in running]
    except psutil.Error:
        return 0.0
    ended = times[0].children_user + times[0].children_system
    return float(ended + sum(each.user + each.system for each in times))


def _children(pid: int) -> list[psutil.Process]:
    """The processes below another one. Where the system says who they are, no others are looked at.

    psutil looks at all processes, which takes seconds on a machine that runs many.
    """
    try:
        lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        lists = []
    if not lists:
        return list(psutil.Process(pid).children(recursive=True))
    found: list[psutil.Process] = []
    for child in (int(word) for text in lists for word in text.split()):
        # It may have ended meanwhile.
        with contextlib.suppress(psutil.Error):
            found += [psutil.Process(child), *_children(child)]
    return found


def _last_words(process: subprocess.Popen[str]) -> tuple[dict[str, int], str | None]:
    """Ends a process; returns what it has counted, and why it failed."""
    process.terminate()
    try:
        out, _ = process.communicate(timeout=END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        return {}, "it did not end"
    try:
        words = json.loads(out)
        return words["counts"], words["failure"]
    except (ValueError, KeyError, TypeError):
        return {}, f"it ended with exit code {process.returncode}"
