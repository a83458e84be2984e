"""What is not part of redis-py's documented interface. Written against 8.1."""

from __future__ import annotations

from typing import Any

import redis
from redis.cluster import RedisCluster
from redis.connection import PythonRespSerializer


def _encode(word: bytes | str | int) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def new_connection(client: redis.Redis, large: int) -> Any:
    """A connection of one's own to a client's server, outside its pool's bookkeeping; it is not connected yet.

    Args:
        client: of one server, or of the master that Sentinels name.
        large: bytes of an argument above which it is sent as it is. hiredis' packer, the default, copies every
            argument into one piece.

    Returns:
        An object with `connect`, `disconnect`, `is_connected`, `pack_commands`, `send_packed_command` and
        `read_response`.

    Written against redis-py 8.1. If it breaks, look at `ConnectionPool.make_connection`, at `command_packer` of
    `AbstractConnection`, and at `PythonRespSerializer` in `redis/connection.py`.
    """
    pool = client.connection_pool
    pool.connection_kwargs["command_packer"] = PythonRespSerializer(large, _encode)
    return pool.make_connection()


def reload_slots(cluster: RedisCluster) -> None:
    """Asks a cluster which of its nodes holds which slots.

    Written against redis-py 8.1. If it breaks, look at `NodesManager.initialize` in `redis/cluster.py`.
    """
    cluster.nodes_manager.initialize()
