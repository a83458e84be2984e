"""Modes that attack what members share in a Redis server: memory, opens, the list of workers, the roster."""

from __future__ import annotations

import os
from collections.abc import Callable

from split_common.transport import member_mark
from split_device.stress.hostile.redis_streams import key_names, redis_client
from split_device.stress.hostile.scene import Scene

#: Bytes of an entry that fills memory: the largest body of a message.
LARGE_ENTRY = 16 * 1024**2

#: Entries of one stream before the next is begun.
ENTRIES = 8

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


def opens(scene: Scene) -> None:
    """Reads, acknowledges and deletes what devices ask for, before other workers can."""
    from split_common.transport.redis.key_names import GROUP

    client, keys = redis_client(scene), key_names(scene)
    stream = keys.opens(scene.service)
    while scene.running:
        with scene.attempt():
            answer = client.execute_command(
                *("XREADGROUP", "GROUP", GROUP, "hostile", "COUNT", 64, "BLOCK", 100, "STREAMS", stream, ">")
            )
            scene.acted()
            for _, entries in answer or []:
                for id_, _ in entries:
                    client.execute_command("XACK", stream, GROUP, id_)
                    client.execute_command("XDEL", stream, id_)
                    scene.acted()
        with scene.attempt():
            client.execute_command("DEL", stream)
            scene.acted()
        scene.pause(PAUSE)


def fleet(scene: Scene) -> None:
    """Removes other workers from the list, changes the boot id, and makes the roster look newer than any."""
    client, keys = redis_client(scene), key_names(scene)
    while scene.running:
        for command in (
            ("DEL", keys.workers),
            ("HSET", keys.workers, os.urandom(8).hex(), os.urandom(100)),
            ("PEXPIRE", keys.workers, 1),
            ("SET", keys.boot, os.urandom(8)),
            ("SET", keys.roster, os.urandom(1000)),
            ("SET", f"{keys.fleet}roster-version", 10**18 - 1),
            ("DEL", keys.roster),
        ):
            with scene.attempt():
                client.execute_command(*command)
            # Also what the server refuses was tried.
            scene.acted()
        with scene.attempt():
            for name in client.hkeys(keys.workers):
                client.hdel(keys.workers, name)
                scene.acted()
        scene.pause(PAUSE)


ATTACKS: dict[str, Callable[[Scene], None]] = {
    "redis-memory": memory,
    "redis-opens": opens,
    "redis-fleet": fleet,
}
