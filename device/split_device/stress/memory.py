"""Resident memory of the fleet's processes, soon after their start and at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from split_device.stress.processes import DeviceProcess, Supervised

#: Time after which the memory of a process that is ready becomes its baseline, in seconds.
SETTLED = 10.0

#: Allowed difference from the baseline at the end: a share of it or a number of bytes, whichever is larger.
GROWTH = 0.10, 16 * 2**20

MIB = 2**20


@dataclass
class Resident:
    """A process's resident memory in bytes: the baseline, 10 s after its start, and the last sample."""

    name: str
    settled: int | None = None
    last: int = 0

    @property
    def within(self) -> bool:
        """Whether the last sample differs from the baseline by at most `GROWTH`."""
        share, least = GROWTH
        return self.settled is None or abs(self.last - self.settled) <= max(share * self.settled, least)

    def facts(self) -> dict[str, object]:
        settled = None if self.settled is None else round(self.settled / MIB, 1)
        return {"process": self.name, "mib_10s": settled, "mib": round(self.last / MIB, 1), "within": self.within}


class Memory:
    """Samples the memory of processes. Of those that have ended only devices are kept."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, Resident]] = {}

    @property
    def residents(self) -> list[Resident]:
        return [resident for _, resident in self._found.values()]

    def sample(self, processes: Iterable[Supervised | DeviceProcess]) -> None:
        """Records the memory of the processes that run."""
        for each in processes:
            if (process := each.process) is None:
                if isinstance(each, Supervised):
                    self._found.pop(each.name, None)
                continue
            with contextlib.suppress(psutil.Error):
                now = psutil.Process(process.pid).memory_info().rss
                if not now:  # it has just ended
                    continue
                pid, resident = self._found.get(each.name, (0, Resident(each.name)))
                if pid != process.pid:
                    resident = Resident(each.name)
                self._found[each.name] = process.pid, resident
                resident.last = now
                if resident.settled is None and time.monotonic() - each.since >= SETTLED:
                    resident.settled = now
