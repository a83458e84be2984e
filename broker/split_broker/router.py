"""The broker's ROUTER socket: who may connect, what is received and sent, and which connections end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import zmq

from split_broker.access import Authentication, claim
from split_broker.connections import Connection, Connections
from split_broker.guard import Guard
from split_broker.memory import MemoryWatch
from split_broker.peer_queue import RoutedMessage
from split_common.errors import ConfigError
from split_common.protocol import headers
from split_common.transport.zmq_socket import HANDSHAKE_LIMIT, HIGH_WATER, receive_frames, send_frames
from split_common.trust.fleet import Fleet

#: Messages that a peer's connection takes before it counts as full. It is higher than `HIGH_WATER`, because ROUTER
#: does not signal when there is room again; the queues' byte credit bounds what lies there.
SEND_HIGH_WATER = 256

#: Frames of a message with its envelope.
FRAMES = 3


class Router:
    """A bound ROUTER socket and its connections. Used by one thread.

    Args:
        address: as `split_common.transport.parse_address` returns it.
        fleet: its members may connect (`split_broker.access`).
        counters: count connections that are refused or ended.
        wait: seconds that `receive` waits for a message.
        memory_limit: resident memory of this process, in bytes, above which connections end; None for no limit.
        queued: the bytes that the broker keeps for the peer on a connection.

    Raises:
        ConfigError: the address is in use, or cannot be used.
        KeysError: the broker's key is not here.
    """

    def __init__(
        self,
        address: str,
        fleet: Fleet,
        counters: Counter[str],
        wait: float,
        memory_limit: int | None,
        queued: Callable[[Connection], int],
    ) -> None:
        self._path: Path | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.authentication = Authentication(fleet, counters)
        self._socket = self._context.socket(zmq.ROUTER)
        self._configure(wait, ipv6="[" in address)
        curve = address.startswith("tcp://")
        self.connections = Connections(self._context, self._socket, curve, counters)
        try:
            if curve:
                self.authentication.secure(self._context, self._socket)
            self._bind(address)
        except BaseException:
            self.close()
            raise
        memory = MemoryWatch(memory_limit, self.connections, queued) if memory_limit is not None else None
        self._guard = Guard(self.connections, self.authentication, memory, self._drained)
        self.look = self._guard.look
        #: The address, with the real port in place of `*`.
        self.address = os.fsdecode(self._socket.last_endpoint).rstrip("\0")  # type: ignore[arg-type]

    def _configure(self, wait: float, ipv6: bool) -> None:
        self._socket.linger = 0
        self._socket.router_mandatory = True
        self._socket.maxmsgsize = headers.MAX_FRAME
        self._socket.ipv6 = ipv6
        self._socket.rcvhwm = HIGH_WATER
        self._socket.sndhwm = SEND_HIGH_WATER
        self._socket.handshake_ivl = HANDSHAKE_LIMIT
        self._socket.rcvtimeo = int(1000 * wait)

    def _bind(self, address: str) -> None:
        path = Path(address.removeprefix("ipc://")) if address.startswith("ipc://") else None
        if path is not None:
            claim(path)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from None
        self._path = path

    def close(self) -> None:
        """Ends all connections and frees the address."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self.connections.close()
        self._socket.close()
        self.authentication.stop()
        self._context.term()

    def receive(self, wait: float | None = None) -> list[zmq.Frame] | None:
        """The next message, with its envelope; None if none comes in time.

        Args:
            wait: seconds, instead of the usual ones.
        """
        try:
            if wait is not None and not self._socket.poll(int(1000 * wait)):
                return None
            frames = receive_frames(self._socket, FRAMES)
        except zmq.Again:
            return None
        self.connections.took(frames)
        return frames

    def send(self, route: bytes, message: RoutedMessage) -> None:
        """Sends a message over a connection without blocking.

        Raises:
            zmq.Again: the connection accepts nothing for the moment.
            zmq.ZMQError: it does not stand any more.
        """
        send_frames(self._socket, route, *message)
        self.connections.gave(route, message)

    def _drained(self) -> bool:
        return not int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN
