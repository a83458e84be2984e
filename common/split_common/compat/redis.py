"""What redis-py does not document. Written against 8.1."""

from __future__ import annotations

from typing import Any

import redis
from redis.cluster import RedisCluster
from redis.connection import PythonRespSerializer


def _encode(word: bytes | str | int) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def new_connection(client: redis.Redis, large: int) -> Any:
    """A new connection to a client's server, which the client's pool does not manage. It is not connected yet.

    Args:
        client: the client of one server, or of the master that Sentinels name.
        large: size in bytes above which an argument is sent without being copied. hiredis' packer, the default,
            copies all arguments into one buffer.

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
