"""Modes of a hostile worker: it draws devices to itself, and then does nothing for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from split_common.protocol import encoding, headers, payloads
from split_common.protocol.capabilities import INDIVISIBLE, UNPADDED
from split_common.protocol.channel import EpochKeys
from split_common.protocol.handshake import WorkerHandshake
from split_device.stress.hostile.peers import LinkPeer
from split_device.stress.hostile.scene import Scene

#: Sessions that it claims to have room for.
ROOM = 2**61

#: Peers of a hostile worker: as many processes as its member claims to run.
PEERS = 8

#: What honest workers of most models do not have either: with these, devices would refuse requests by themselves.
LACKS = frozenset({INDIVISIBLE, UNPADDED})

#: Seconds between two looks whether it has to end.
WAIT = 0.2


def black_hole(scene: Scene) -> None:
    """Takes every open, and answers none."""
    _serve(scene, lambda *_: scene.acted())


def mute(scene: Scene) -> None:
    """Completes the set-up of channels, and answers no request."""
    _serve(scene, MuteWorker(scene).take)


class MuteWorker:
    """Sets up channels. Called on the threads of several peers, each with its own channels."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._half_open: dict[tuple[bytes, int], WorkerHandshake] = {}
        self._control: dict[tuple[bytes, int], EpochKeys] = {}

    def take(self, peer: LinkPeer, header: headers.AnyHeader, body: bytes) -> None:
        scene = self._scene
        if isinstance(header, headers.Open):
            handshake = WorkerHandshake(scene.identity, scene.verify, scene.service, body, lacks=LACKS)
            self._half_open[header.sender, header.channel] = handshake
            answer = headers.Relay(header.sender, peer.id, headers.RelayKind.ANSWER, header.channel)
            peer.send(answer, handshake.answer)
        elif isinstance(header, headers.Relay) and header.kind == headers.RelayKind.FINISH:
            self._finish(peer, header, body)
        scene.acted()

    def _finish(self, peer: LinkPeer, header: headers.Relay, body: bytes) -> None:
        id_ = header.sender, header.channel
        if (handshake := self._half_open.pop(id_, None)) is not None:
            self._control[id_] = handshake.finish(body).epoch_keys(0, 0)
        if (keys := self._control.get(id_)) is None:
            return
        reply = headers.Relay(
            header.sender, peer.id, headers.RelayKind.REPLY, header.channel, counter=keys.next_counter()
        )
        peer.send(reply, keys.seal(reply, encoding.encode_payload(payloads.Done(), overhead=keys.tag_size)))


def _serve(scene: Scene, take: Callable[[LinkPeer, headers.AnyHeader, bytes], None]) -> None:
    """Joins as several workers that take all that comes, until the end."""
    while scene.running:
        with scene.attempt(), contextlib.ExitStack() as stack:
            for _ in range(PEERS):
                stack.enter_context(_worker(scene, take))
            # Joining is what draws devices: whether any comes is up to the fleet.
            scene.acted()
            while scene.running:
                scene.pause(WAIT)


def _worker(scene: Scene, take: Callable[[LinkPeer, headers.AnyHeader, bytes], None]) -> LinkPeer:
    peers: list[LinkPeer] = []

    def taken(header: headers.AnyHeader, body: bytes) -> None:
        if peers:
            take(peers[0], header, body)

    peers.append(LinkPeer(scene, taken, service=scene.service, model="hostile", room=ROOM))
    return peers[0]


ATTACKS: dict[str, Callable[[Scene], None]] = {"black-hole": black_hole, "mute": mute}
