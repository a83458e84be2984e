"""Which worker a device gets: the policy of all transports. Pure: no I/O, no state, no clock.

A device without a worker sends an `Open`, which waits as a `PendingOpen`. Each time that something changes,
`decide` says what happens to it, given all workers that are alive.
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

#: Most characters of a refusal's explanation.
MAX_DETAIL = 4096

_Body = TypeVar("_Body")


@dataclass
class PendingOpen(Generic[_Body]):
    """A device's `Open` that no worker has been given yet. A device has one at a time."""

    header: headers.Open
    #: The message, which is passed on unchanged.
    frames: tuple[bytes, _Body]
    #: Time at which the device is told to try again, by the clock of the caller of `decide`.
    deadline: float
    #: Whether any worker of its service can already take it, so it must not be assigned again.
    placed: bool = False


class Candidate(NamedTuple):
    """A worker that is alive, as it last announced itself."""

    id: bytes
    service: headers.Service
    model: str
    #: Further sessions that it can hold.
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
        """The message for the sender of a message with this header."""
        bounce = headers.Bounce(
            self.reason, header.channel, detail=self.detail[:MAX_DETAIL], retry_after=self.retry_after
        )
        if isinstance(header, headers.Open):
            return bounce
        return msgspec.structs.replace(
            bounce, session=header.session, epoch=header.epoch, seq=header.seq, peer=header.to
        )


#: The receiver of a message is not connected.
GONE = Refuse("gone", "the peer is not connected")


def full(why: str, retry_after: float = FULL_RETRY) -> Refuse:
    """The receiver of a message accepts nothing for the moment."""
    return Refuse("full", why, retry_after)


def decide(
    pending: PendingOpen[_Body], workers: Sequence[Candidate], early: bool, now: float
) -> Assign | Refuse | Wait:
    """What happens to an open. Of the workers that the device does not avoid, the one with the most room gets it.

    Args:
        pending: the open.
        workers: all that are alive, of every service. Of several with equal room the first one gets it.
        early: whether workers that are alive may be missing, because the queue has just started. While it is,
            no device is told that there is no worker, or none that it does not avoid.
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
    """The models and layers that workers serve, for a message."""
    services = sorted({(worker.model, worker.service.first, worker.service.last) for worker in workers})
    return ", ".join(f"{model} layers {first}:{last}" for model, first, last in services) or "none"
