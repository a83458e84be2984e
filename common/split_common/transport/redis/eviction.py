"""Whether the server would drop keys when its memory is full: with lanes, messages vanish, and peers seem dead."""

from __future__ import annotations

import re

from split_common.transport.redis.answers import Refused
from split_common.transport.redis.server import RedisConnections

#: The policy with which the server takes nothing new instead.
SAFE_POLICY = b"noeviction"


def eviction_policy(connections: RedisConnections, key: str) -> str:
    """The policy (maxmemory-policy) by which a server drops keys once its memory is full.

    Args:
        connections: to the server; its user should be allowed `INFO`.
        key: says which server of a cluster is asked.

    Returns:
        Empty if it drops none, or does not say.

    Raises:
        BrokerUnreachable: the server does not answer.
    """
    (answer,) = connections.run([(key, ("INFO", "memory"))])
    if not isinstance(answer, bytes) or not re.search(rb"^maxmemory:[1-9]", answer, re.MULTILINE):
        return ""
    policy = re.search(rb"^maxmemory_policy:(\S+)", answer, re.MULTILINE)
    return policy[1].decode(errors="replace") if policy and policy[1] != SAFE_POLICY else ""


def warning(shown: str, policy: str) -> str:
    """What to do about such a policy."""
    return (
        f"{shown} drops keys when its memory is full (maxmemory-policy {policy}), and with them messages: set "
        "maxmemory-policy noeviction"
    )


def refuse_eviction(connections: RedisConnections, key: str, shown: str) -> None:
    """Raises Refused if the server would drop keys."""
    if policy := eviction_policy(connections, key):
        raise Refused(warning(shown, policy))
