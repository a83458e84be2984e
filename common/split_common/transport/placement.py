"""Which worker a device is given: the one policy of all transports. Pure: no I/O, no state, no clock of its own.

A device without a worker sends an `Open`. It waits as a `PendingOpen`, and each time that something changes
`decide` says what becomes of it, given all workers that are alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import msgspec

from split_common.protocol import headers
from split_common.transport.base import FULL_RETRY

#: Seconds after which a device may try again when every worker was full.
BUSY_RETRY = 1.0

#: Characters of a refusal's explanation, at most.
MAX_DETAIL = 4096

_Body = TypeVar("_Body")


@dataclass
class PendingOpen(Generic[_Body]):
    """A device's `Open` that no worker has been given yet. A device has one at a time."""

    header: headers.Open
    #: The message, to be passed on as it came.
    frames: tuple[bytes, _Body]
    #: When the device is told to try again, by the clock of whoever calls `decide`.
    deadline: float
    #: Whether it lies where any worker of its service may take it, so that it must not be assigned again.
    placed: bool = False


class Candidate(NamedTuple):
    """A worker that is alive, as it last announced itself."""

    id: bytes
    service: headers.Service
    model: str
    #: Sessions that it has room for.
    room: int


class Assign(NamedTuple):
    """The open goes to this worker."""

    worker: bytes


class Wait(NamedTuple):
    """The open stays pending."""


class Refuse(NamedTuple):
    """A message is not delivered, and its sender is told why."""

    reason: Literal["no-worker", "busy", "gone", "full"]
    detail: str
    #: Seconds after which another attempt may succeed; 0 if waiting does not help.
    retry_after: float = 0.0

    def bounce(self, header: headers.Relay | headers.Open) -> headers.Bounce:
        """What the sender of a message with this header is told."""
        bounce = headers.Bounce(
            self.reason, header.channel, detail=self.detail[:MAX_DETAIL], retry_after=self.retry_after
        )
        if isinstance(header, headers.Open):
            return bounce
        return msgspec.structs.replace(
            bounce, session=header.session, epoch=header.epoch, seq=header.seq, peer=header.to
        )


#: The receiver of a message is not there.
GONE = Refuse("gone", "the peer is not connected")


def full(why: str, retry_after: float = FULL_RETRY) -> Refuse:
    """The receiver of a message takes no more for the moment."""
    return Refuse("full", why, retry_after)


def decide(
    pending: PendingOpen[_Body], workers: Sequence[Candidate], early: bool, now: float
) -> Assign | Refuse | Wait:
    """What becomes of an open: the worker with the most room gets it, of those that the device does not avoid.

    Args:
        pending: the open.
        workers: all that are alive, of every service. Of several with equal room the first is taken.
        early: whether workers that are alive may be missing, because the queue has just started. Until they had
            time to come back, no device is told that there is no worker, or none that it does not avoid.
        now: the time, by the same clock as the open's deadline.
    """
    serving = [worker for worker in workers if worker.service == pending.header.service]
    wanted = [worker for worker in serving if worker.id not in pending.header.avoid]
    able = [worker for worker in wanted if worker.room > 0]
    if able and not pending.placed:
        return Assign(max(able, key=lambda worker: worker.room).id)
    if not serving:
        return Wait() if early else Refuse("no-worker", served(workers))
    if now > pending.deadline or not (wanted or early):
        return Refuse("busy", "every worker is full", BUSY_RETRY)
    return Wait()


def served(workers: Iterable[Candidate]) -> str:
    """The models and layers that workers serve, for people to read."""
    services = sorted({(worker.model, worker.service.first, worker.service.last) for worker in workers})
    return ", ".join(f"{model} layers {first}:{last}" for model, first, last in services) or "none"
