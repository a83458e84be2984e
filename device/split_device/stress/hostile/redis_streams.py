"""Writes to Redis as a member's user may, without the product's transport and its limits."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from split_common.protocol import headers
from split_common.transport.address import is_redis
from split_device.stress.hostile.peers import LinkPeer
from split_device.stress.hostile.scene import Scene

if TYPE_CHECKING:
    import redis

    from split_common.transport.redis.key_names import Keys


def redis_client(scene: Scene) -> redis.Redis:
    """A client with this member's user and password."""
    import redis

    from split_common.transport.redis.answers import PASSWORD_VARIABLE

    return redis.Redis.from_url(scene.address, password=os.environ.get(PASSWORD_VARIABLE))


def key_names(scene: Scene) -> Keys:
    """The names of the fleet's keys."""
    from split_common.transport.redis.key_names import Keys

    return Keys(scene.fleet.operator_key)


class LaneWriter:
    """Adds any entry to a worker's stream."""

    def __init__(self, scene: Scene) -> None:
        self._client = redis_client(scene)
        self._keys = key_names(scene)
        self._workers = [member.name for member in scene.fleet.roster().members if member.role == "worker"]

    def __enter__(self) -> LaneWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def workers(self) -> list[bytes]:
        """The ids of all workers that have announced themselves. Raises redis.RedisError, SplitError."""
        from split_common.transport.redis.membership import MAX_LIST, read_list

        found: list[bytes] = []
        for member in self._workers:
            _, listed = read_list(member, self._client.getrange(self._keys.workers(member), 0, MAX_LIST))
            found += [worker.sender for worker in listed]
        return found

    def add_to_worker(self, worker: bytes, head: bytes, body: bytes) -> None:
        """Adds an entry to a worker's lane. Raises redis.RedisError."""
        from split_common.transport.redis.key_names import entry

        lane = self._keys.lane("worker", worker)
        self._client.execute_command("XADD", lane, "NOMKSTREAM", "*", *entry(head, body))


def open_sender(scene: Scene, peer: LinkPeer) -> Callable[[headers.Open, bytes], None]:
    """What sends opens at any rate: over Redis a link sends one at a time, so that they go into workers' lanes."""
    if not is_redis(scene.address):
        return peer.send
    writer = LaneWriter(scene)
    workers = writer.workers()

    def send(header: headers.Open, body: bytes) -> None:
        for worker in workers:
            writer.add_to_worker(worker, headers.encode_header(header), body)

    return send
