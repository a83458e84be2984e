"""The `Open`s of devices that wait for a worker, and to which worker each goes.

`split_common.transport.placement` decides; this keeps what it has to know, and does what it says. Only the broker's
loop uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from split_broker.delivery import Delivery
from split_broker.peer_queue import BodyBytes, Peer, RoutedMessage
from split_broker.set_ups import SetUps
from split_common.protocol import headers
from split_common.transport.base import OPEN_PATIENCE
from split_common.transport.placement import (
    BUSY_RETRY,
    Assign,
    Candidate,
    PendingOpen,
    Refuse,
    Trials,
    decide,
)
from split_common.trust.shares import newest_of_largest

#: Opens that are pending at a time.
MAX_PENDING = 1024

#: Answers an open of a member that has more than its share of them.
TOO_OFTEN = Refuse("busy", "this member asks for too many workers at once", BUSY_RETRY)


class Opens:
    """Pending opens, and how workers have answered those before.

    Args:
        delivery: knows the peers, and delivers to them.
        turned_away: says why workers of a service were not let in lately.
        random: draws among workers.
    """

    def __init__(
        self,
        delivery: Delivery,
        turned_away: Callable[[headers.Service, float], list[str]],
        random: Random | None = None,
    ) -> None:
        self._delivery = delivery
        self._turned_away = turned_away
        self._random = random or Random()
        self._trials = Trials()
        #: The set-ups that opens begin.
        self.set_ups = SetUps()
        #: By the device's id, oldest first. A device has one at a time.
        self.pending: dict[bytes, PendingOpen[BodyBytes]] = {}

    def make_room(self, sender: Peer, header: headers.Open) -> bool:
        """Whether an open of this device may be pending. If there are too many, a device is told."""
        if len(self.pending) < MAX_PENDING or sender.id in self.pending:
            return True
        # The member with the most pending opens loses its newest one.
        peers = self._delivery.peers
        last = newest_of_largest([*self.pending, sender.id], lambda id_: peers[id_].member)
        lost = self.pending.pop(last).header if last != sender.id else header
        self._delivery.refuse(peers[last], lost, TOO_OFTEN)
        return last != sender.id

    def ask(self, sender: Peer, header: headers.Open, message: RoutedMessage, now: float, early: bool) -> None:
        """Takes a device's open, or the repetition of one, and gives it to a worker if one has room.

        Args:
            now: the time, by `time.monotonic`.
            early: whether workers that are alive may not have announced themselves yet.
        """
        known = self.pending.get(sender.id)
        # An open that is repeated keeps its deadline.
        since = self.set_ups.asked(sender, header.channel, now)
        if known is None or known.header.channel != header.channel:
            known = self.pending[sender.id] = PendingOpen(header, message, since + OPEN_PATIENCE)
            self._trials.asks_again(sender.id, now)
        self._place([known], now, early)

    def place(self, now: float, early: bool, service: headers.Service | None = None) -> None:
        """Decides on the pending opens, in their order: on all, or on those of one service."""
        asking = (one for one in self.pending.values() if service is None or one.header.service == service)
        self._place(list(asking), now, early)

    def _place(self, asking: list[PendingOpen[BodyBytes]], now: float, early: bool) -> None:
        workers = self.candidates() if asking else []
        for one in asking:
            device = self._delivery.peers[one.header.sender]
            silent, asked = self.set_ups.silent(device, now), self.set_ups.asked_before(device)
            tried = self._trials.now(now)
            match decide(one, workers, early, now, silent, asked, self._random, tried):
                case Assign(id_):
                    self._give(one, device, self._delivery.peers[id_], now)
                    workers = self.candidates()
                case Refuse() as refusal:
                    del self.pending[device.id]
                    if refusal.reason == "no-worker":
                        refusal = refusal.without(self._turned_away(one.header.service, now))
                    self._delivery.refuse(device, one.header, refusal)

    def _give(self, one: PendingOpen[BodyBytes], device: Peer, worker: Peer, now: float) -> None:
        worker.room -= 1
        if self._delivery.put(worker, one.frames, device.member):
            self.set_ups.given(device, worker)
            self._trials.given(worker.member, device.id, now)
            del self.pending[device.id]
        else:
            # It is gone, or takes nothing more until its next announcement.
            worker.room = 0

    def candidates(self) -> list[Candidate]:
        """All workers, in the order in which they joined."""
        return [
            Candidate(peer.id, peer.service, peer.model, peer.room, peer.member, peer.certified)
            for peer in self._delivery.peers.values()
            if peer.service is not None
        ]

    def vouched(self, workers: Iterable[bytes]) -> None:
        """Notes which workers have answered a device, as it says itself."""
        for worker in filter(None, map(self._delivery.peers.get, workers)):
            if worker.role == "worker":
                self._trials.answered(worker.member)

    def forget(self, peer: bytes) -> None:
        """Forgets all about a peer that is gone."""
        self.pending.pop(peer, None)
        self.set_ups.forget(peer)
        self._trials.forget(peer)
