"""Modes that send what no honest peer sends: damaged, misplaced, forged and old messages."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import zmq

from split_common.protocol import headers
from split_common.transport import new_peer_id
from split_common.transport.address import is_redis
from split_device.stress.hostile.peers import BarePeer, DeviceChannel, LinkPeer, linked_channel, step
from split_device.stress.hostile.redis_streams import LaneWriter
from split_device.stress.hostile.scene import Scene

#: Messages between two pauses, and the length of a pause in seconds.
BURST, PAUSE = 32, 0.005

#: Good messages that are kept in order to be damaged or sent again.
KEPT = 64


def garbage(scene: Scene) -> None:
    """Sends messages that break the protocol, on a socket of its own or right into the workers' streams."""
    while scene.running:
        with scene.attempt():
            if is_redis(scene.address):
                _garbage_into_streams(scene)
            else:
                _garbage_over_zmq(scene)


def _garbage_over_zmq(scene: Scene) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        while scene.running:
            with BarePeer(scene, context) as peer:
                peer.join()
                for _ in range(10 * BURST):
                    if not scene.running:
                        return
                    peer.send_frames(*_damaged(scene, peer.id))
                    scene.acted()
                    scene.pause(PAUSE / 8)
                # Larger than a frame may be: the broker closes the connection.
                peer.send_frames(bytes(headers.MAX_FRAME + 1), b"")
    finally:
        context.destroy(0)


def _garbage_into_streams(scene: Scene) -> None:
    with linked_channel(scene) as channel, LaneWriter(scene) as writer:
        while scene.running:
            for _ in range(BURST):
                frames = _damaged(scene, new_peer_id(scene.member))
                writer.add_to_worker(channel.worker, frames[0], b"".join(frames[1:]))
                scene.acted()
            scene.pause(PAUSE)


def _damaged(scene: Scene, sender: bytes) -> list[bytes]:
    """The frames of a message that is refused."""
    random = scene.random
    good = headers.encode_header(headers.Open(sender, scene.number(), scene.service))
    match random.randrange(7):
        case 0:
            return [random.randbytes(random.randrange(200)), random.randbytes(100)]
        case 1:
            return [good[: random.randrange(len(good))], b""]
        case 2:
            return [bytes((good[0],)) + random.randbytes(2 * headers.MAX_HEADER), b""]
        case 3:
            return [good] * random.randrange(1, 50)
        case 4:
            wrong: list[headers.Header] = [
                headers.Welcome(random.randbytes(8), 99, [random.randbytes(8)]),
                headers.RosterReply(),
                headers.Bounce("gone", 1, 1, 0),
                headers.Announce(random.randbytes(8), "worker", "worker-1", leaving=True),
            ]
            return [headers.encode_header(random.choice(wrong)), random.randbytes(1000)]
        case 5:
            return [b"\x01" + b"\x91" * 5000, b""]
    relay = headers.Relay(random.randbytes(8), sender, headers.RelayKind.REQUEST, 1)
    return [headers.encode_header(relay), bytes(random.choice((0, 1024**2)))]


def senders(scene: Scene) -> None:
    """Sends requests and set-ups whose sender is another peer: of this member, and of any."""
    while scene.running:
        with scene.attempt(), linked_channel(scene) as channel:
            header, body = channel.request(scene.number(), 0, *step(scene, 1, 1))
            with LinkPeer(scene) as other:
                _send_as_others(scene, channel, other, header, body)


def _send_as_others(
    scene: Scene, channel: DeviceChannel, other: LinkPeer, header: headers.Relay, body: bytes
) -> None:
    writer = LaneWriter(scene) if is_redis(scene.address) else None
    for _ in range(1000):
        for _ in range(BURST):
            if not scene.running:
                return
            sender = scene.random.choice([other.id, new_peer_id("device-1"), channel.worker, bytes(8)])
            kind = scene.random.choice(list(headers.RelayKind))
            forged = msgspec.structs.replace(header, sender=sender, kind=kind, counter=scene.number())
            if writer is not None:
                writer.add_to_worker(channel.worker, headers.encode_header(forged), body)
            else:
                other.send(forged, body)
            scene.acted()
        scene.pause(PAUSE)


def replays(scene: Scene) -> None:
    """Sends its own old messages again: as they were, under other numbers, and with a flipped bit."""
    while scene.running:
        with scene.attempt(), LinkPeer(scene) as peer:
            channel = DeviceChannel(scene, peer)
            session = scene.number()
            kept = [channel.request(session, seq, *step(scene, 1, 8, start=8 * seq)) for seq in range(KEPT // 2)]
            while scene.running:
                for _ in range(BURST):
                    peer.send(*_replayed(scene, *scene.random.choice(kept)))
                    scene.acted()
                scene.pause(PAUSE)


def _replayed(scene: Scene, header: headers.Relay, body: bytes) -> tuple[headers.Relay, bytes]:
    random = scene.random
    match random.randrange(3):
        case 0:
            return header, body
        case 1:
            field = random.choice(["session", "epoch", "seq", "counter", "channel"])
            return msgspec.structs.replace(header, **{field: getattr(header, field) + 1}), body
    at = random.randrange(len(body))
    return header, bytes((*body[:at], body[at] ^ 1 << random.randrange(8), *body[at + 1 :]))


ATTACKS: dict[str, Callable[[Scene], None]] = {"garbage": garbage, "senders": senders, "replays": replays}
