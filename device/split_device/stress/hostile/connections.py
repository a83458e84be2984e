"""Modes that attack the queue by connections: before any key counts, without an end, unread, or very many."""

from __future__ import annotations

import contextlib
import queue
import struct
import time
from collections.abc import Callable

import zmq

from split_common.protocol import headers
from split_common.transport.address import is_redis
from split_common.transport.base import HEARTBEAT
from split_device.stress.hostile.curve import COMMAND, LARGE, CurveConnection, connect
from split_device.stress.hostile.peers import BarePeer, DeviceChannel, LinkPeer, step
from split_device.stress.hostile.scene import Scene
from split_device.stress.hostile.sessions import REPLY_ROWS, TOKENS, repeat_reply

#: Connections without a key, the bytes that each claims to send and sends, and how long it stays, in seconds.
STRANGERS, CLAIMED, SENT, STAY = 16, 16 * 1024**2, 8 * 1024**2, 2.0

#: Bytes of a frame of a message that never ends, and frames between two pauses of `PAUSE` seconds.
FRAME, FRAMES, PAUSE = 1024**2, 8, 0.01

#: Messages that an unread socket keeps in this process.
UNREAD = 2

#: Peers that join at once, over each transport, and unknown peers that each of them watches.
ZMQ_PEERS, REDIS_PEERS, WATCHED = 256, 24, headers.MAX_WATCHED


def preauth(scene: Scene) -> None:
    """Sends the beginning of a large command on each of many connections, and waits."""
    data = bytes(SENT)
    while scene.running:
        with scene.attempt(), contextlib.ExitStack() as stack:
            for _ in range(STRANGERS):
                sock = stack.enter_context(connect(scene.address))
                sock.sendall(bytes((COMMAND | LARGE,)) + struct.pack(">Q", CLAIMED))
                with contextlib.suppress(OSError):
                    sock.sendall(data)
                scene.acted()
            scene.pause(STAY)


def multipart(scene: Scene) -> None:
    """Sends frames of one message for ever."""
    frame = bytes(FRAME)
    while scene.running:
        with scene.attempt(), CurveConnection(scene.address, scene.fleet, scene.identity) as connection:
            while scene.running:
                for _ in range(FRAMES):
                    connection.send_frame(frame, more=True)
                    scene.acted()
                scene.pause(PAUSE)


def credit(scene: Scene) -> None:
    """Has large replies repeated, reads none of them, and claims by each heartbeat to have received all."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        while scene.running:
            with scene.attempt(), BarePeer(scene, context, unread=UNREAD) as peer:
                peer.join()
                channel = DeviceChannel(scene, peer)
                session = scene.number()
                peer.announce(watching=[channel.worker])
                channel.request(session, 0, *step(scene, REPLY_ROWS, TOKENS))
                _wait_for_reply(scene, peer, channel)

                def claim(peer: BarePeer = peer, worker: bytes = channel.worker) -> None:
                    peer.announce(received=2**60, watching=[worker])

                repeat_reply(scene, channel, session, claim)
    finally:
        context.destroy(0)


def _wait_for_reply(scene: Scene, peer: BarePeer, channel: DeviceChannel) -> None:
    """Waits for a reply, and sends heartbeats meanwhile."""
    while scene.running:
        peer.announce(watching=[channel.worker])
        with contextlib.suppress(queue.Empty):
            channel.answered(HEARTBEAT)
            return


def peers(scene: Scene) -> None:
    """Joins many times over, each time as a peer that wants to be told of the death of unknown ones."""
    while scene.running:
        with scene.attempt():
            if is_redis(scene.address):
                _join_redis(scene)
            else:
                _join_zmq(scene)


def _join_zmq(scene: Scene) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        joined = [BarePeer(scene, context, unread=UNREAD) for _ in range(ZMQ_PEERS)]
        while scene.running:
            begun = time.monotonic()
            for peer in joined:
                if not scene.running:
                    return
                # A connection that takes nothing for the moment is tried again with the next heartbeat.
                with contextlib.suppress(zmq.Again):
                    peer.announce(watching=_strangers(scene))
                    scene.acted()
            scene.pause(HEARTBEAT - (time.monotonic() - begun))
    finally:
        context.destroy(0)


def _join_redis(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(REDIS_PEERS):
            if not scene.running:
                return
            stack.enter_context(LinkPeer(scene, watching=_strangers(scene)))
            scene.acted()
        scene.stop.wait()


def _strangers(scene: Scene) -> list[bytes]:
    """Ids of peers that do not exist."""
    data = scene.random.randbytes(8 * WATCHED)
    return [data[at : at + 8] for at in range(0, len(data), 8)]


ATTACKS: dict[str, Callable[[Scene], None]] = {
    "preauth": preauth,
    "multipart": multipart,
    "credit": credit,
    "peers": peers,
}
