"""Modes that attack what members share in a Redis server: memory, streams, the lists of workers, the roster."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from split_common.protocol import headers
from split_common.transport import member_mark
from split_device.stress.hostile.peers import announcement
from split_device.stress.hostile.redis_streams import LaneWriter, key_names, redis_client
from split_device.stress.hostile.scene import Scene

#: Bytes of an entry that fills memory: the largest body of a message.
LARGE_ENTRY = 16 * 1024**2

#: Entries of one stream before the next is begun.
ENTRIES = 8

#: Bytes of a list of workers: just below what is read.
LIST_BYTES = 120 * 1024

#: Seconds between two rounds.
PAUSE = 0.01


def memory(scene: Scene) -> None:
    """Adds large entries to streams that only this member can read, and that nobody reads."""
    client, keys, body = redis_client(scene), key_names(scene), bytes(LARGE_ENTRY)
    mark = member_mark(scene.member)
    while scene.running:
        lane = keys.lane("device", mark + os.urandom(4))
        for _ in range(ENTRIES):
            with scene.attempt():
                client.execute_command("XADD", lane, "*", "h", b"", "b", body)
                scene.acted()
            if not scene.running:
                return
        scene.pause(PAUSE)


def lanes(scene: Scene) -> None:
    """Adds large entries to all workers' streams, however much already waits there."""
    body = bytes(LARGE_ENTRY)
    while scene.running:
        with scene.attempt(), LaneWriter(scene) as writer:
            workers = writer.workers()
            for _ in range(ENTRIES):
                for worker in workers:
                    if not scene.running:
                        return
                    writer.add_to_worker(worker, b"\x01", body)
                    scene.acted()
                scene.pause(PAUSE)


def fleet(scene: Scene) -> None:
    """Tries to remove other workers from their lists, to change the boot id, and to replace the roster.

    What is its own it fills: its list with junk, and its copy of the roster with noise.
    """
    client, keys = redis_client(scene), key_names(scene)
    others = [
        member.name
        for member in scene.fleet.roster().members
        if member.role == "worker" and member.name != scene.member
    ]
    commands: list[tuple[bytes | str | int, ...]] = [
        *(("DEL", keys.workers(name)) for name in others),
        *(("SET", keys.workers(name), b"\x90") for name in others),
        *(("PEXPIRE", keys.workers(name), 1) for name in others),
        ("SET", keys.workers(scene.member), bytes(LARGE_ENTRY)),
        ("SET", keys.workers(scene.member), _crowd(scene)),
        ("SET", keys.boot, os.urandom(8)),
        ("SETNX", keys.boot, os.urandom(8)),
        ("DEL", keys.boot),
        ("SET", keys.roster, os.urandom(1000)),
        ("DEL", keys.roster),
        ("SET", keys.roster_copy(scene.member), os.urandom(1000)),
    ]
    while scene.running:
        for command in commands:
            with scene.attempt():
                client.execute_command(*command)
            # What the server refuses was tried, too.
            scene.acted()
        scene.pause(PAUSE)


def _crowd(scene: Scene) -> bytes:
    """A list of as many workers as fit, all of which claim room and none of which lives."""
    from split_common.transport.redis.membership import MAX_LISTED

    mark = member_mark(scene.member)
    entries: list[bytes] = []
    while len(data := msgspec.msgpack.encode((scene.identity.certificate_bytes, entries))) < LIST_BYTES:
        if len(entries) >= MAX_LISTED:
            break
        claimed = announcement(scene, mark + os.urandom(4), service=scene.service, model="hostile", room=2**61)
        entries += [headers.encode_header(claimed)] * 16
    return data


ATTACKS: dict[str, Callable[[Scene], None]] = {
    "redis-memory": memory,
    "redis-lanes": lanes,
    "redis-fleet": fleet,
}
