"""The fleet's processes: devices, and broker or Redis server and workers, which are restarted when they end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from split_common.errors import SplitError
from split_common.system.process import running_command
from split_device.stress.events import decode
from split_device.stress.ledger import Ledger

#: Interval between two checks of a process, in seconds.
POLL_INTERVAL = 0.05

#: Delay before another attempt to restart a process, in seconds.
RESTART_DELAY = 0.5

Start = Callable[[], AbstractContextManager["subprocess.Popen[str]"]]


class Supervised:
    """A process that is restarted whenever it ends, until `end`. Methods may be called from any thread."""

    def __init__(self, name: str, start: Start) -> None:
        self.name = name
        self._start = start
        self._ending = threading.Event()
        self._first = threading.Event()
        self._error: SplitError | None = None
        self._thread = threading.Thread(target=self._supervise, name=f"stress-{name}", daemon=True)
        #: The process while it is ready, and the time (`time.monotonic`) at which it became ready.
        self.process: subprocess.Popen[str] | None = None
        self.since = 0.0
        self.stopped = False
        #: How often the process ended by itself, or could not be started again.
        self.crashes = 0
        self._killed = False

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        """Waits until the process is ready for the first time. Raises SplitError if it cannot be started."""
        self._first.wait()
        if self._error is not None:
            raise self._error

    def _supervise(self) -> None:
        while not self._ending.is_set():
            try:
                with self._start() as process:
                    self.process, self.since, self.stopped = process, time.monotonic(), False
                    self._killed = False
                    self._first.set()
                    while process.poll() is None and not self._ending.wait(POLL_INTERVAL):
                        pass
                    self.resume()
                    self.process = None
                    self.crashes += not (self._killed or self._ending.is_set())
            except (SplitError, OSError, ValueError) as error:
                if not self._first.is_set():
                    self._error = error if isinstance(error, SplitError) else SplitError(f"{self.name}: {error}")
                    self._first.set()
                    return
                self.crashes += 1
                self._ending.wait(RESTART_DELAY)

    @property
    def running(self) -> bool:
        """Whether the process is ready and not stopped."""
        return self.process is not None and not self.stopped

    def kill(self) -> None:
        """SIGKILL."""
        if (process := self.process) is not None:
            self.process, self._killed = None, True
            process.kill()

    def stop(self) -> None:
        """SIGSTOP: the process hangs, and its connections stay open."""
        self._signal(signal.SIGSTOP, stopped=True)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT, stopped=False)

    def _signal(self, number: signal.Signals, stopped: bool) -> None:
        if (process := self.process) is not None:
            process.send_signal(number)
            self.stopped = stopped

    def end(self) -> None:
        """Ends the process and its restarts; `join` waits until it has ended."""
        self._ending.set()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()


class DeviceProcess:
    """A device process; its events go to the ledger."""

    def __init__(self, index: int, arguments: list[str], log: Path, env: dict[str, str], ledger: Ledger) -> None:
        self.name = f"device {index}"
        self.index = index
        self._arguments = arguments
        self._log = log
        self._env = env
        self._ledger = ledger
        self._ready = threading.Event()
        self._killed = False
        self._error: SplitError | None = None
        self._thread = threading.Thread(target=self._run, name=f"stress-{self.name}", daemon=True)
        self.process: subprocess.Popen[str] | None = None
        self.since = 0.0

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        """Waits until the process is ready. Raises SplitError if it cannot be started."""
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with running_command(self._arguments, self._log, self._env) as (process, _):
                self.process, self.since = process, time.monotonic()
                self._ready.set()
                if self._killed:
                    process.kill()
                assert process.stdout is not None
                for line in process.stdout:
                    # The last line of a process that was killed may be cut off.
                    with contextlib.suppress(msgspec.DecodeError):
                        self._ledger.take(self.index, decode(line))
                if (code := process.wait()) != 0:
                    self._ledger.errors[f"a device process ended with exit code {code}"] += 1
                self.process = None
        except SplitError as error:
            self._error = error
            self._ready.set()

    def finish(self) -> None:
        """SIGTERM: the process ends after its current request."""
        if (process := self.process) is not None:
            process.terminate()

    def kill(self) -> None:
        """SIGKILL: at once, or when the process is ready."""
        self._killed = True
        if (process := self.process) is not None:
            process.kill()

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        if self._thread.ident is not None:
            self._thread.join(timeout)


def command(arguments: list[str], log: Path, env: dict[str, str]) -> Start:
    """A function that starts a `lambda-split` command, whose stderr is appended to `log`."""

    @contextlib.contextmanager
    def start() -> Iterator[subprocess.Popen[str]]:
        with running_command(arguments, log, env) as (process, _):
            yield process

    return start
