"""What a run of the stress command is to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TransportName = Literal["zmq", "redis"]
Kind = Literal["text", "image"]
Workload = Literal["text", "image", "mixed"]

#: Where UNets are cut.
CUT = "C"


@dataclass(frozen=True)
class Plan:
    """What to run: the command's options, checked."""

    workload: Workload
    devices: int
    workers: int
    #: Requests of each device; None to go on until the time is over.
    requests: int | None
    seconds: float | None
    transport: TransportName
    #: A queue that runs already; None to start one.
    broker: str | None
    #: A checkpoint; None for a small random model of each kind.
    model: str | None
    reference: str | None
    head_layers: int
    tail_layers: int
    chaos: list[str]
    seed: int
    keys: Path | None

    def kind(self, index: int) -> Kind:
        """What the device or the worker of this index is for."""
        if self.workload == "mixed":
            return "image" if index % 2 else "text"
        return self.workload

    @property
    def kinds(self) -> list[Kind]:
        return ["text", "image"] if self.workload == "mixed" else [self.workload]
