"""Modes that attack the set-up of channels, which costs a worker more than a hostile device."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from split_common.protocol import headers
from split_common.protocol.handshake import DeviceHandshake
from split_device.stress.hostile.peers import DeviceChannel, LinkPeer
from split_device.stress.hostile.redis_streams import open_sender
from split_device.stress.hostile.scene import Scene

#: Threads, each with a peer of its own, that set up channels.
THREADS = 4

#: Channels that a peer sets up before it leaves and joins under another id.
CHANNELS_PER_PEER = 32

#: Opens between two pauses, and the length of a pause in seconds.
BURST, PAUSE = 16, 0.005

#: Bytes of a body where a set-up's first message is expected, which has at most 80 KiB.
LARGE_BODY = 4 * 1024**2


def channels(scene: Scene) -> None:
    """Sets up channels, one after another, over several peers at once."""

    def work() -> None:
        while scene.running:
            with scene.attempt(), LinkPeer(scene) as peer:
                for _ in range(CHANNELS_PER_PEER):
                    if not scene.running:
                        return
                    DeviceChannel(scene, peer)
                    scene.acted()

    scene.run_threads(THREADS, work)


def half_open(scene: Scene) -> None:
    """Sends first messages of set-ups at a high rate, each for a channel of its own."""
    hello = DeviceHandshake(scene.identity, scene.verify, scene.service, "float32").hello

    def work() -> None:
        while scene.running:
            with scene.attempt(), LinkPeer(scene) as peer:
                send = open_sender(scene, peer)
                for count in itertools.count(1):
                    if not scene.running:
                        return
                    send(headers.Open(peer.id, scene.number(), scene.service), hello)
                    scene.acted()
                    if count % BURST == 0:
                        scene.pause(PAUSE)

    scene.run_threads(THREADS, work)


def opens(scene: Scene) -> None:
    """Sends opens that are large, damaged, or for services that nobody has, and asks for the roster."""
    body = scene.random.randbytes(LARGE_BODY)
    while scene.running:
        with scene.attempt(), LinkPeer(scene) as peer:
            send = open_sender(scene, peer)
            while scene.running:
                nobody = headers.Service(scene.random.randbytes(32), 0, 1)
                for service, size in ((nobody, LARGE_BODY), (scene.service, LARGE_BODY), (scene.service, 200)):
                    send(headers.Open(peer.id, scene.number(), service), body[:size])
                    scene.acted()
                for _ in range(BURST):
                    peer.send(headers.RosterRequest(peer.id))
                    scene.acted()
                scene.pause(PAUSE)


ATTACKS: dict[str, Callable[[Scene], None]] = {"channels": channels, "half-open": half_open, "opens": opens}
