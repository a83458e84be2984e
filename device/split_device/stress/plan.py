"""The plan of a run of the stress command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from split_common.models.split import DEFAULT_LAYERS, Layers

TransportName = Literal["zmq", "redis"]
WorkloadKind = Literal["text", "image", "agents"]
Workload = Literal["text", "image", "mixed", "agents"]

#: Kinds of faults.
FAULTS = ("kill", "stop", "broker", "lag", "drop", "corrupt")

#: Kinds of faults that need the proxy.
NETWORK_FAULTS = ("lag", "drop", "corrupt")

#: Added to the niceness of devices under faults, so that workers and broker run as if on other machines.
NICENESS = 10


@dataclass(frozen=True)
class StressPlan:
    """The command's options, checked."""

    workload: Workload = "text"
    devices: int = 8
    workers: int = 3
    #: Number of requests of each device; None if `seconds` limits the run.
    requests: int | None = 25
    seconds: float | None = None
    transport: TransportName = "zmq"
    #: Address of a running queue; None to start one.
    broker: str | None = None
    #: A checkpoint; None for a small random model of each kind.
    model: str | None = None
    reference: str | None = None
    #: The body of language models.
    layers: Layers = DEFAULT_LAYERS
    #: Kinds of faults, out of `FAULTS`.
    chaos: Sequence[str] = ()
    seed: int = 0
    keys: Path | None = None
    #: Modes of a hostile member, out of `hostile.modes.MODES`, in their order.
    hostile: Sequence[str] = ()

    def kind(self, index: int) -> WorkloadKind:
        """The workload of the device or worker with this index."""
        if self.workload == "mixed":
            return "image" if index % 2 else "text"
        return self.workload

    @property
    def kinds(self) -> list[WorkloadKind]:
        return ["text", "image"] if self.workload == "mixed" else [self.workload]
