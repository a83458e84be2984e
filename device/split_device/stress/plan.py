"""What a run of the stress command does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from split_common.models.split import END_LAYERS

TransportName = Literal["zmq", "redis"]
WorkloadKind = Literal["text", "image"]
Workload = Literal["text", "image", "mixed"]

#: Where UNets are cut.
STRESS_CUT = "C"


@dataclass(frozen=True)
class StressPlan:
    """What to run: the command's options, checked."""

    workload: Workload = "text"
    devices: int = 8
    workers: int = 3
    #: Requests of each device; None to go on until the time is over.
    requests: int | None = 25
    seconds: float | None = None
    transport: TransportName = "zmq"
    #: A queue that runs already; None to start one.
    broker: str | None = None
    #: A checkpoint; None for a small random model of each kind.
    model: str | None = None
    reference: str | None = None
    head_layers: int = END_LAYERS
    tail_layers: int = END_LAYERS
    #: The kinds of faults.
    chaos: Sequence[str] = ()
    seed: int = 0
    keys: Path | None = None

    def kind(self, index: int) -> WorkloadKind:
        """What the device or the worker of this index is for."""
        if self.workload == "mixed":
            return "image" if index % 2 else "text"
        return self.workload

    @property
    def kinds(self) -> list[WorkloadKind]:
        return ["text", "image"] if self.workload == "mixed" else [self.workload]
