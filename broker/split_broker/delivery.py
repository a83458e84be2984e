"""What the broker sends: to which peers, through which queues, and what it says of a peer that is gone."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable

import zmq

from split_broker.connections import Connection
from split_broker.peer_queue import Peer, PeerQueue, Queued, RoutedMessage
from split_broker.quotas import Budget
from split_broker.router import Router
from split_common.protocol import headers
from split_common.transport.placement import Refuse, full
from split_common.trust.fleet import Fleet
from split_common.trust.limited_log import LimitedLog

log = logging.getLogger(__name__)

#: Bytes of memory that a watched peer's id takes.
WATCHED_BYTES = 80


class Delivery:
    """The peers that have announced themselves, and the messages for them. Used by the broker's thread alone.

    Args:
        router: the broker's socket.
        fleet: the peers' fleet.
        counters: count messages and bytes routed, messages refused by reason, and peers that are gone.
        capacity: bytes of messages that may wait for all peers.
        gone: is told of each peer that is taken out.
    """

    def __init__(
        self,
        router: Router,
        fleet: Fleet,
        counters: Counter[str],
        capacity: int,
        gone: Callable[[Peer], object],
    ) -> None:
        self._router = router
        self._fleet = fleet
        self._counters = counters
        self._gone = gone
        self._boot = os.urandom(8)
        self._log = LimitedLog(log)
        self._budget = Budget(capacity)
        # Messages that lost their place in a queue, of which their senders are still to be told.
        self._gave_way: deque[Queued] = deque()
        #: The peers by id, and their ids by connection.
        self.peers: dict[bytes, Peer] = {}
        self.routes: dict[bytes, bytes] = {}
        #: Peers, by id, whose connection accepts nothing for the moment.
        self.blocked: set[bytes] = set()

    def add(self, header: headers.Announce, route: bytes, member: str) -> Peer:
        """Takes in a peer that announces itself over a connection."""
        queue = PeerQueue(member, self._budget.usage, self._gave_way.append)
        peer = self.peers[header.sender] = Peer(header.sender, route, header.role, member, queue)
        self.routes[route] = peer.id
        self._log.info(member, "%s %s joined", header.role, peer.name)
        return peer

    def move(self, peer: Peer, route: bytes) -> None:
        """Notes that a peer has a new connection."""
        self.routes.pop(peer.route, None)
        self._router.connections.left(peer.route)
        self.routes[route] = peer.id
        peer.route = route
        peer.queue.reconnected()

    def put(self, peer: Peer, message: RoutedMessage, sender: str = "") -> bool:
        """Queues a message and sends what it can. False if the queue is full, or the peer has gone.

        Args:
            sender: the member that sent it; empty for the broker's own, which are small.
        """
        size = len(message[0]) + len(message[1])
        if sender and not self._budget.make_room(peer.member, size, self.peers.values(), self._end):
            return False
        if peer.queue.skip(len(message[1]), sender):
            if self.send(peer, message):
                return True
            peer.queue.unskip(len(message[1]), sender)
            if peer.id not in self.peers:
                return False
        if not peer.queue.put(message, sender):
            return False
        self.flush(peer)
        return peer.id in self.peers

    def refuse(self, to: Peer, header: headers.Relay | headers.Open, refusal: Refuse) -> None:
        """Tells the sender of a message that it was not delivered."""
        self._counters[f"bounced_{refusal.reason}"] += 1
        if isinstance(header, headers.Relay) and log.isEnabledFor(logging.DEBUG):
            log.debug("session %s: bounced, %s", headers.session_label(header.session), refusal.detail)
        self.put(to, (headers.encode_header(refusal.bounce(header)), b""))

    def tell_gave_way(self) -> None:
        """Tells the senders of messages that lost their place in a queue."""
        while self._gave_way:
            header = headers.decode_header(self._gave_way.popleft().message[0])
            if isinstance(header, headers.Relay | headers.Open) and header.sender in self.peers:
                self.refuse(self.peers[header.sender], header, full("others share the queue"))

    def flush(self, peer: Peer) -> None:
        """Sends what waits for a peer, as far as its credit and its connection allow."""
        self.blocked.discard(peer.id)
        while peer.id in self.peers and (queued := peer.queue.take()) is not None:
            if not self.send(peer, queued.message):
                peer.queue.put_back(queued)
                return

    def send(self, peer: Peer, message: RoutedMessage) -> bool:
        """Sends a message past the queue. False if the connection does not take it now, or has ended."""
        try:
            self._router.send(peer.route, message)
        except zmq.Again:
            self.blocked.add(peer.id)
            return False
        except zmq.ZMQError:
            # A worker whose connection is closed is dead. A device may reconnect: its heartbeats decide.
            if peer.role == "worker":
                self.remove(peer, "lost its connection")
            return False
        self._counters["messages_routed"] += 1
        self._counters["bytes_routed"] += len(message[0]) + len(message[1])
        return True

    def remove(self, peer: Peer, why: str) -> None:
        """Takes a peer out, and tells those that watch it. `why` continues its name in the log."""
        if self.peers.pop(peer.id, None) is None:
            return
        self._log.info(peer.member, "%s %s %s", peer.role, peer.name, why)
        self._counters[f"{peer.role}s_gone"] += 1
        self.routes.pop(peer.route, None)
        self._router.connections.left(peer.route)
        self._gone(peer)
        peer.queue.clear()
        self.blocked.discard(peer.id)
        for watcher in [other for other in self.peers.values() if peer.id in other.watching]:
            self.put(watcher, self.welcome([peer.id]))

    def welcome(self, gone: list[bytes]) -> RoutedMessage:
        """The answer to an announcement. `gone` are the watched peers that are not here."""
        return headers.encode_header(headers.Welcome(self._boot, self._fleet.roster().version, gone)), b""

    def roster(self) -> RoutedMessage:
        """The answer to a request for the roster."""
        return headers.encode_header(headers.RosterReply()), self._fleet.roster_bytes()

    def queued(self, connection: Connection) -> int:
        """Bytes that wait for the peer on a connection, and what else is kept of it."""
        peer = self.peers.get(self.routes.get(connection.route or b"", b""))
        return peer.queue.waiting_bytes + WATCHED_BYTES * len(peer.watching) if peer is not None else 0

    def _end(self, peer: Peer) -> None:
        """Ends the connection of a peer that reads too slowly."""
        self._router.connections.end_route(peer.route, "slow")
        peer.queue.reconnected()
