"""Steps of sessions on their way through the scheduler, and the parts of them that go into a forward."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from split_common.engine.sequences import Run

_Run = TypeVar("_Run", bound=Run)
_Request = TypeVar("_Request")


@dataclass(eq=False)
class ScheduledStep(Generic[_Request, _Run]):
    """A step of a session.

    Args:
        session: the session, whose steps run one after the other.
        member: whose session it is; members take turns.
        prefill: whether it may wait, and may be computed in chunks. All other steps go whole into the next forward.
        request: the caller's object, which the scheduler does not read.
        weight: how much there is to compute, for a step that begins only when its turn has come, because it takes
            much memory from then on; 0 for all others, which may begin at once.
    """

    session: Hashable
    member: Hashable
    prefill: bool
    request: _Request
    weight: float = 0.0
    #: Whether it has to wait for its turn before it begins.
    pending: bool = False
    #: What is to be computed; empty until the step has started.
    runs: Sequence[_Run] = ()
    #: Its place among steps that do not all go into one forward, unless it is prefill (`FairTurns`).
    turn: float = 0.0
    #: Since when there has been no memory for it, by `time.monotonic`, and how much that is; None if there is some.
    starved_since: float | None = None
    lacked: int = 0
    #: Whether a forward with a part of it is running. Only one does at a time.
    in_flight: bool = False
    #: How much of each run has been computed, in units of its `cost`.
    done: list[int] = field(default_factory=list)
    #: The outputs of each run's chunks so far.
    outputs: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """How much there is to compute in all."""
        return sum(run.cost for run in self.runs)

    @property
    def complete(self) -> bool:
        """Whether all its runs have been computed."""
        return all(done == run.cost for done, run in zip(self.done, self.runs, strict=True))

    def output(self) -> torch.Tensor:
        """The outputs of all runs, concatenated: `[tokens, width]` for tokens; empty if there are no runs."""
        outputs = [part for parts in self.outputs for part in parts]
        # Most steps have a single output, which may be large, so it is not copied.
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0] if outputs else torch.empty(0, 0)


@dataclass(frozen=True)
class ScheduledChunk(Generic[_Request, _Run]):
    """The part of a step's run number `index`, or the whole run, that goes into the next forward."""

    step: ScheduledStep[_Request, _Run]
    index: int
    run: _Run
