"""Progress of the stress command: a live table on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.live import Live
from rich.table import Table

from split_common.system.console import stderr
from split_device.stress.chaos import Chaos
from split_device.stress.ledger import Ledger
from split_device.stress.processes import Supervised

#: Interval between two lines if stderr is not a terminal, in seconds.
LINE_INTERVAL = 15.0


@contextlib.contextmanager
def shown(ledger: Ledger, chaos: Chaos | None, workers: list[Supervised]) -> Iterator[Callable[[], None]]:
    """Yields the function that refreshes the view; call it often."""
    if stderr.is_terminal:
        with Live(console=stderr, auto_refresh=False, transient=True) as live:
            yield lambda: live.update(_table(ledger, chaos, workers), refresh=True)
        return
    next_line = time.monotonic() + LINE_INTERVAL

    def line() -> None:
        nonlocal next_line
        if time.monotonic() >= next_line:
            next_line += LINE_INTERVAL
            stderr.print(_line(ledger, chaos, workers), soft_wrap=True)

    yield line


def _table(ledger: Ledger, chaos: Chaos | None, workers: list[Supervised]) -> Table:
    devices = Table("device", title=_line(ledger, chaos, workers), title_justify="left")
    for column in ("asked", "answered", "replays"):
        devices.add_column(column, justify="right")
    asked = list(ledger.answers.items())
    for device in sorted({device for (device, _), _ in asked}):
        mine = [answers for (index, _), answers in asked if index == device]
        traffic = ledger.traffic.get(device)
        replays = str(traffic.replays) if traffic is not None else "0"
        devices.add_row(str(device), str(len(mine)), str(sum(mine)), replays)
    both = Table.grid(padding=(0, 4))
    both.add_row(devices, _workers(workers))
    return both


def _workers(workers: list[Supervised]) -> Table:
    table = Table("worker", "state", title=" ")
    for worker in workers:
        state = "stopped" if worker.stopped else "running" if worker.running else "starting"
        table.add_row(worker.name, state)
    return table


def _line(ledger: Ledger, chaos: Chaos | None, workers: list[Supervised]) -> str:
    passed = time.monotonic() - ledger.began
    running = sum(worker.running for worker in workers)
    faults = sum(chaos.counts.values()) if chaos is not None else 0
    return (
        f"{passed:.0f} s: {ledger.completed} of {ledger.requests} requests answered, "
        f"{ledger.rate():.0f} tokens or steps/s, "
        f"{running} of {len(workers)} workers running, {faults} faults, {ledger.replays} recoveries"
    )
