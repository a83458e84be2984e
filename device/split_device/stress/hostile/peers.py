"""A hostile member's peers: over the product's own transport, or a bare socket; and channels over either."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import msgspec
import zmq

from split_common.protocol import encoding, headers, payloads
from split_common.protocol.channel import Channel, EpochKeys
from split_common.protocol.handshake import DeviceHandshake
from split_common.transport import connect, new_peer_id
from split_common.transport.zmq_socket import curve_client
from split_device.stress.hostile.scene import PATIENCE, Scene

#: Most messages that a peer keeps unread; further ones are dropped.
INBOX = 1024

#: Seconds that a bare socket waits until it can send.
SEND_TIMEOUT = 0.5

Message = tuple[headers.AnyHeader, bytes]
Wanted = Callable[[headers.AnyHeader], bool]


class HostilePeer(Protocol):
    """Sends what it is told to."""

    id: bytes

    def send(self, header: headers.Header, body: bytes = b"") -> None: ...

    def receive(self, wanted: Wanted, timeout: float = PATIENCE) -> Message:
        """The next message that is wanted. Raises queue.Empty if none comes in time."""


def announcement(scene: Scene, id_: bytes, **fields: Any) -> headers.Announce:
    """The heartbeat of a peer of this member."""
    role = scene.role
    assert role != "broker"
    return headers.Announce(id_, role, scene.member, **fields)


class LinkPeer:
    """A peer over the product's transport, which keeps the connection and its heartbeats (a `Handler`).

    Args:
        scene: its member connects.
        take: is called with each message, on the transport's thread; by default messages wait to be received.
        fields: of its announcements.

    Raises:
        BrokerUnreachable: the queue does not answer.
    """

    def __init__(
        self, scene: Scene, take: Callable[[headers.AnyHeader, bytes], None] | None = None, **fields: Any
    ) -> None:
        self.id = new_peer_id(scene.member)
        self._inbox: queue.Queue[Message] = queue.Queue(INBOX)
        self._take = take or self._keep
        self._announcement = announcement(scene, self.id, **fields)
        self.transport = connect(scene.address, scene.fleet, scene.identity)
        self.transport.start(self, PATIENCE)

    def __enter__(self) -> LinkPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()

    def send(self, header: headers.Header, body: bytes = b"") -> None:
        self.transport.send(header, body)

    def receive(self, wanted: Wanted, timeout: float = PATIENCE) -> Message:
        deadline = time.monotonic() + timeout
        while True:
            header, body = self._inbox.get(timeout=max(0.001, deadline - time.monotonic()))
            if wanted(header):
                return header, body

    def _keep(self, header: headers.AnyHeader, body: bytes) -> None:
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait((header, body))

    def watch(self, *peers: bytes) -> None:
        """Wants to be told of the death of these peers, as a device of its workers'."""
        watching = [*self._announcement.watching, *peers]
        self._announcement = msgspec.structs.replace(self._announcement, watching=watching[-headers.MAX_WATCHED :])

    def on_message(self, header: headers.AnyHeader, body: bytes) -> None:
        self._take(header, body)

    def on_gone(self, peers: Iterable[bytes]) -> None: ...

    def on_reset(self) -> None: ...

    def on_roster(self) -> None: ...

    def announcement(self) -> headers.Announce:
        return self._announcement


class BarePeer:
    """A peer with a ZeroMQ socket of its own, which sends no heartbeats by itself and reads only when told to.

    Args:
        scene: its member connects.
        context: of the socket.
        unread: most messages that wait in this process unread; the rest stays with the broker.
    """

    def __init__(self, scene: Scene, context: zmq.Context[zmq.Socket[bytes]], unread: int = INBOX) -> None:
        self._scene = scene
        self.id = new_peer_id(scene.member)
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = unread
        self.socket.sndtimeo = int(1000 * SEND_TIMEOUT)
        if scene.address.startswith("tcp://"):
            curve_client(self.socket, scene.fleet, scene.identity)
        self.socket.connect(scene.address)

    def __enter__(self) -> BarePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, header: headers.Header, body: bytes = b"") -> None:
        self.send_frames(headers.encode_header(header), body)

    def send_frames(self, *frames: bytes) -> None:
        """Sends a message of any frames. Raises zmq.Again if the connection takes nothing."""
        self.socket.send_multipart(frames)

    def announce(self, **fields: Any) -> None:
        self.send(announcement(self._scene, self.id, **fields), self._scene.identity.certificate_bytes)

    def receive(self, wanted: Wanted, timeout: float = PATIENCE) -> Message:
        deadline = time.monotonic() + timeout
        while self.socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            frames = self.socket.recv_multipart()
            header = headers.decode_header(frames[0])
            if wanted(header):
                return header, frames[-1]
        raise queue.Empty

    def join(self, **fields: Any) -> None:
        """Announces itself, and waits for the broker's answer."""
        self.announce(**fields)
        self.receive(lambda header: isinstance(header, headers.Welcome))


class DeviceChannel:
    """A channel of a hostile device to a worker that the queue chooses.

    Args:
        scene: its member sets the channel up.
        peer: it runs over.

    Raises:
        SplitError, queue.Empty: it cannot be set up.
    """

    def __init__(self, scene: Scene, peer: HostilePeer) -> None:
        self._peer = peer
        self._scene = scene
        self.number = scene.number()
        self._keys: dict[tuple[headers.SessionRef, int], EpochKeys] = {}
        handshake = DeviceHandshake(scene.identity, scene.verify, scene.service, "float32")
        peer.send(headers.Open(peer.id, self.number, scene.service), handshake.hello)
        header, body = peer.receive(self._is(headers.RelayKind.ANSWER))
        assert isinstance(header, headers.Relay)
        #: The worker's peer id.
        self.worker = header.sender
        finish, self._channel = handshake.finish(body)
        if isinstance(peer, LinkPeer):
            peer.watch(self.worker)
        peer.send(headers.Relay(self.worker, peer.id, headers.RelayKind.FINISH, self.number), finish)
        peer.receive(self._is(headers.RelayKind.REPLY))

    @property
    def channel(self) -> Channel:
        return self._channel

    def _is(self, kind: headers.RelayKind) -> Wanted:
        return lambda header: (
            isinstance(header, headers.Relay) and header.kind == kind and header.channel == self.number
        )

    def seal(
        self, session: headers.SessionRef, seq: int, payload: payloads.Payload, tensor: bytes = b"", epoch: int = 0
    ) -> tuple[headers.Relay, bytes]:
        """The frames of a request."""
        keys = self._keys.get((session, epoch))
        if keys is None:
            keys = self._keys[session, epoch] = self._channel.epoch_keys(session, epoch)
        header = headers.Relay(
            self.worker,
            self._peer.id,
            headers.RelayKind.REQUEST,
            self.number,
            session,
            epoch,
            seq,
            keys.next_counter(),
        )
        return header, keys.seal(header, encoding.encode_payload(payload, tensor, overhead=keys.tag_size))

    def request(
        self, session: headers.SessionRef, seq: int, payload: payloads.Payload, tensor: bytes = b"", epoch: int = 0
    ) -> tuple[headers.Relay, bytes]:
        """Sends a request; returns its frames."""
        frames = self.seal(session, seq, payload, tensor, epoch)
        self._peer.send(*frames)
        self._scene.acted()
        return frames

    def answered(self, timeout: float = PATIENCE) -> headers.Relay:
        """Waits for the answer to any request. Raises queue.Empty if none comes in time."""
        header, _ = self._peer.receive(self._is(headers.RelayKind.REPLY), timeout)
        assert isinstance(header, headers.Relay)
        return header


def step(scene: Scene, rows: int, tokens: int, start: int = 0) -> tuple[payloads.Step, bytes]:
    """A step that appends `tokens` to each of the first `rows` rows, and its hidden states, zeros."""
    positions = list(range(start, start + tokens))
    runs = [payloads.Run(row, start, positions) for row in range(rows)]
    return payloads.Step("float32", scene.width, runs), bytes(4 * scene.width * rows * tokens)


@contextlib.contextmanager
def linked_channel(scene: Scene, **fields: Any) -> Iterator[DeviceChannel]:
    """A channel over a link of its own.

    Raises:
        SplitError, queue.Empty: it cannot be set up.
    """
    with LinkPeer(scene, **fields) as peer:
        yield DeviceChannel(scene, peer)
