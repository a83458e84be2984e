"""What redis-py does not document. Written against 8.1."""

from __future__ import annotations

import socket
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


def check_tls(client: redis.Redis) -> None:
    """Reads the files and values of a client's TLS options, as connecting would, without a server.

    Raises:
        OSError, ValueError, RedisError: one of them cannot be used.

    Written against redis-py 8.1, which reads them after it has connected. If it breaks, look at
    `SSLConnection._wrap_socket_with_ssl` in `redis/connection.py`.
    """
    with socket.socket() as unconnected:
        connection: Any = client.connection_pool.make_connection()
        connection._wrap_socket_with_ssl(unconnected).close()
