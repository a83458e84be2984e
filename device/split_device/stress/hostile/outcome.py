"""What a hostile member cost the honest ones: throughput beside it, and beside a bystander; memory; the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from split_device.stress.ledger import Ledger
from split_device.stress.processes import Supervised

MIB = 2**20

#: Least share of its throughput beside a bystander that honest members must have beside a hostile one.
LEAST_SHARE = 0.5

#: Least share of the hostile member's CPU that its bystander must have got, for the two slices to be alike. With
#: less, honest members had more of the machine in the second slice, and the mode's share is too low.
LEAST_BURNED = 0.9

#: Seconds of CPU time per second that are too few to matter.
NEGLIGIBLE = 0.05

#: Bytes that a process may take beyond what it has when the first slice begins (docs/security.md), by the first
#: word of its name in the report. A broker: its `--memory-limit`, and what arrives in a fifth of a second.
#: A worker: 512 MiB of requests that wait, 1 GiB of kept replies, 256 MiB that wait to be sent, and a forward.
#: A Redis server: its `maxmemory`, a quarter of that for connections, and what its allocator wastes.
GROWTH = {"broker": 1024 * MIB, "worker": 2048 * MIB, "redis": 1536 * MIB}


@dataclass(frozen=True)
class Window:
    """The time of a slice, in seconds since the run began, and what happened in it."""

    began: float
    ended: float
    #: CPU time of the hostile member or of the bystander, in seconds.
    cpu: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def cores(self) -> float:
        """Seconds of CPU time per second."""
        return self.cpu / max(self.seconds, 1e-9)

    def throughput(self, ledger: Ledger, devices: Iterable[int]) -> float:
        """Tokens or denoising steps of these honest devices, per second."""
        return ledger.decoded_between(self.began, self.ended, devices) / max(self.seconds, 1e-9)


@dataclass
class ModeOutcome:
    """One mode: its slice, and that of its bystander."""

    hostile: Window
    bystander: Window
    #: Tokens or denoising steps of honest devices per second, beside each of the two.
    honest_beside_hostile: float
    honest_beside_bystander: float
    #: Requests of honest devices that failed during both slices.
    lost: int
    #: Processes of the fleet that ended by themselves during both slices.
    crashed: int
    #: What the hostile member did, and what was refused to it, by type of error.
    acts: int
    refused: Mapping[str, int]
    #: Why it ended early; None if it did not.
    failure: str | None
    #: The process whose memory exceeded its bound, so that the slice was ended early and the process was killed;
    #: None if none did.
    exceeded: str | None

    @property
    def share(self) -> float:
        """Throughput beside the hostile member, as a share of that beside the bystander; 0 if both are 0."""
        if not self.honest_beside_bystander:
            return 0.0
        return self.honest_beside_hostile / self.honest_beside_bystander

    @property
    def burned(self) -> float | None:
        """CPU per second that the bystander got, as a share of the hostile member's; None if both are next to 0."""
        return None if self.hostile.cores < NEGLIGIBLE else self.bystander.cores / self.hostile.cores

    @property
    def alike(self) -> bool:
        """Whether the two slices are alike: the bystander got as much CPU as it should, or has little to burn."""
        return self.burned is None or self.burned >= LEAST_BURNED

    @property
    def acted(self) -> bool:
        """Whether the mode was tested at all."""
        return self.failure is None and self.acts > 0

    def facts(self) -> dict[str, Any]:
        return {
            "honest_beside_hostile": round(self.honest_beside_hostile, 1),
            "honest_beside_bystander": round(self.honest_beside_bystander, 1),
            "share": round(self.share, 3),
            "lost": self.lost,
            "crashed": self.crashed,
            "cpu_seconds": round(self.hostile.cpu, 2),
            "bystander_cpu_seconds": round(self.bystander.cpu, 2),
            "bystander_burned": None if self.burned is None else round(self.burned, 3),
            "alike": self.alike,
            "seconds": round(self.hostile.seconds, 1),
            "acts": self.acts,
            "refused": dict(self.refused),
            "failure": self.failure,
            "memory_exceeded": self.exceeded,
        }


@dataclass
class Peaks:
    """The largest memory of processes, by name, and what bounds it. In bytes."""

    peaks: dict[str, int] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)

    def sample(self, processes: Iterable[Supervised]) -> list[Supervised]:
        """Notes the memory of processes. Returns those that are above their bound."""
        above = []
        for each in processes:
            if (process := each.process) is None:
                continue
            with contextlib.suppress(psutil.Error):
                if self.note(each.name, psutil.Process(process.pid).memory_info().rss):
                    above.append(each)
        return above

    def note(self, name: str, size: int) -> bool:
        """Notes the memory of a process. Its first size, before any slice, sets its bound.

        Returns:
            Whether it is above its bound.
        """
        self.bounds.setdefault(name, size + GROWTH[name.partition(" ")[0]])
        self.peaks[name] = max(size, self.peaks.get(name, 0))
        return size > self.bounds[name]

    @property
    def bounded(self) -> bool:
        """Whether no process was ever above its bound."""
        return all(peak <= self.bounds[name] for name, peak in self.peaks.items())

    def facts(self) -> dict[str, Any]:
        return {
            name: {"peak_mib": round(peak / MIB, 1), "bound_mib": round(self.bounds[name] / MIB, 1)}
            for name, peak in self.peaks.items()
        }


@dataclass
class HostileOutcome:
    """All modes of a run."""

    modes: dict[str, ModeOutcome]
    memory: Peaks

    @property
    def share(self) -> float:
        """The worst mode's share; 0 if there was none."""
        return min((mode.share for mode in self.modes.values()), default=0.0)

    @property
    def memory_bounded(self) -> bool:
        return self.memory.bounded

    @property
    def withstood(self) -> bool:
        """Whether each mode was tested, and cost honest members no more than it may."""
        acted = all(mode.acted for mode in self.modes.values())
        return bool(self.modes) and acted and self.share >= LEAST_SHARE and self.memory_bounded

    def facts(self) -> dict[str, Any]:
        return {
            "modes": {name: mode.facts() for name, mode in self.modes.items()},
            "honest_throughput_share": round(self.share, 3),
            "memory_bounded": self.memory_bounded,
            "memory": self.memory.facts(),
        }
