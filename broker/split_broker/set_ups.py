"""The set-ups of channels, as the broker sees them: which workers leave which devices without an answer.

Only the device's word counts, and only for the device's own member: it repeats what was not answered, and sends a
request over a channel that is set up. So a hostile worker cannot answer with junk to look well, and a hostile
device harms nobody but itself. Only the broker's loop uses this.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from split_broker.peer_queue import Peer
from split_common.protocol import headers
from split_common.protocol.headers import RelayKind
from split_common.transport.placement import Silences

#: Workers that were given an open before and are remembered: more than a device asks by itself.
MAX_ASKED = 16


@dataclass
class SetUp:
    """A device's newest channel."""

    channel: int
    #: When the device asked for it first, by `time.monotonic`.
    since: float
    #: Name of the worker's member that owes an answer, and whether to the device's `FINISH`.
    worker: str | None = None
    finishing: bool = False
    #: Ids of the workers that were given the device's open.
    asked: list[bytes] = field(default_factory=list)


class SetUps:
    """The set-ups under way, and the workers that did not answer lately."""

    def __init__(self) -> None:
        # By the device's id.
        self._newest: dict[bytes, SetUp] = {}
        # By the device's member: workers' members.
        self._silences: dict[str, Silences[str]] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def asked(self, device: Peer, channel: int, now: float) -> float:
        """Notes that a device sent an open, perhaps again. Returns when it did so first."""
        known = self._newest.get(device.id)
        if known is None or known.channel != channel:
            known = self._newest[device.id] = SetUp(channel, now)
        self._unanswered(device, known, now)
        return known.since

    def given(self, device: Peer, worker: Peer) -> None:
        """Notes that the device's open went to a worker."""
        if (known := self._newest.get(device.id)) is not None:
            known.worker, known.finishing = worker.member, False
            known.asked = [*known.asked, worker.id][-MAX_ASKED:]

    def sent(self, device: Peer, worker: Peer, header: headers.Relay, now: float) -> None:
        """Notes that a device sent a worker a message over a channel."""
        known = self._newest.get(device.id)
        if known is None or known.channel != header.channel:
            return
        if header.kind == RelayKind.FINISH:
            if known.finishing:
                self._unanswered(device, known, now)
            known.worker, known.finishing = worker.member, True
        elif header.kind == RelayKind.REQUEST and known.finishing:
            self._silences_of(device).end(worker.member)
            del self._newest[device.id]

    def asked_before(self, device: Peer) -> list[bytes]:
        """Ids of the workers that were given the device's newest open before."""
        known = self._newest.get(device.id)
        return known.asked if known is not None else []

    def silent(self, device: Peer, now: float) -> set[str]:
        """The members of workers that did not answer this device's member lately."""
        silences = self._silences.get(device.member)
        if silences is None:
            return set()
        silent = silences.now(now)
        if not len(silences):
            del self._silences[device.member]
        return silent

    def forget(self, peer: bytes) -> None:
        """Forgets the set-up of a device that is gone."""
        self._newest.pop(peer, None)

    def _unanswered(self, device: Peer, known: SetUp, now: float) -> None:
        if known.worker is not None:
            self._silences_of(device).note(known.worker, now)
            known.worker = None

    def _silences_of(self, device: Peer) -> Silences[str]:
        return self._silences.setdefault(device.member, Silences())
