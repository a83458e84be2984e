"""The fleet's processes: broker or Redis server and workers, which are kept running, and devices."""

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

#: Seconds between two looks at a process.
POLL = 0.05

#: Seconds before another attempt to start what could not be started again.
RESTART_DELAY = 0.5

Start = Callable[[], AbstractContextManager["subprocess.Popen[str]"]]


class Supervised:
    """A process that is started again whenever it ends, until `close`."""

    def __init__(self, name: str, start: Start) -> None:
        self.name = name
        self._start = start
        self._ending = threading.Event()
        self._first = threading.Event()
        self._error: SplitError | None = None
        self._thread = threading.Thread(target=self._keep, name=f"stress-{name}", daemon=True)
        #: The process while it is ready, and since when it is.
        self.process: subprocess.Popen[str] | None = None
        self.since = 0.0
        self.stopped = False

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        """Returns when it is ready for the first time. Raises SplitError when it cannot be started."""
        self._first.wait()
        if self._error is not None:
            raise self._error

    def _keep(self) -> None:
        while not self._ending.is_set():
            try:
                with self._start() as process:
                    self.process, self.since, self.stopped = process, time.monotonic(), False
                    self._first.set()
                    while process.poll() is None and not self._ending.wait(POLL):
                        pass
                    self.resume()
                    self.process = None
            except (SplitError, OSError, ValueError) as error:
                if not self._first.is_set():
                    self._error = error if isinstance(error, SplitError) else SplitError(f"{self.name}: {error}")
                    self._first.set()
                    return
                self._ending.wait(RESTART_DELAY)

    @property
    def running(self) -> bool:
        """Whether it is ready and not stopped."""
        return self.process is not None and not self.stopped

    def kill(self) -> None:
        """SIGKILL."""
        if (process := self.process) is not None:
            self.process = None
            process.kill()

    def stop(self) -> None:
        """SIGSTOP: it hangs, and its connections stand."""
        self._signal(signal.SIGSTOP, stopped=True)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT, stopped=False)

    def _signal(self, number: signal.Signals, stopped: bool) -> None:
        if (process := self.process) is not None:
            process.send_signal(number)
            self.stopped = stopped

    def end(self) -> None:
        """From now on it is not kept, and ends soon; `join` waits for that."""
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
        self._error: SplitError | None = None
        self._thread = threading.Thread(target=self._run, name=f"stress-{self.name}", daemon=True)
        self.process: subprocess.Popen[str] | None = None
        self.since = 0.0

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        """Returns when it is ready. Raises SplitError when it cannot be started."""
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with running_command(self._arguments, self._log, self._env) as (process, _):
                self.process, self.since = process, time.monotonic()
                self._ready.set()
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
        """Tells it to end after its present request."""
        if (process := self.process) is not None:
            process.terminate()

    def kill(self) -> None:
        if (process := self.process) is not None:
            process.kill()

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        if self._thread.ident is not None:
            self._thread.join(timeout)


def command(arguments: list[str], log: Path, env: dict[str, str]) -> Start:
    """Starts a `lambda-split` command; what it says goes to the end of `log`."""

    @contextlib.contextmanager
    def start() -> Iterator[subprocess.Popen[str]]:
        with running_command(arguments, log, env) as (process, _):
            yield process

    return start
