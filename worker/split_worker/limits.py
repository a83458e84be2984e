"""The limits of a worker's sessions and queue."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerLimits:
    """Limits of a worker's sessions and queue. Memory for keys and values is limited by the body."""

    #: Most sessions held at once.
    max_sessions: int = 1024
    #: Seconds without a request after which a session is closed.
    idle_timeout: float = 900.0
    #: Seconds without a request after which a session may be evicted in favour of another one.
    evict_after: float = 10.0
    #: Most tokens of sessions that are kept for copies; None for all that the others leave free, 0 to keep none.
    kept_tokens: int | None = None
    #: Tokens by which each session is expected to grow. A new one is admitted only if there is memory for them.
    growth: int = 64
    #: Most bytes of replies, over all sessions, that are kept to be sent again. If there are more, the least
    #: recently used sessions of the member with the largest share lose theirs.
    max_replies: int = 1024**3
    #: Seconds in which a reply is sent again once at most. Devices ask again after three.
    repeat_after: float = 1.0
    #: Bytes of replies that are sent again to one member: each second on average, and at once.
    repeat_rate: int = 16 * 1024**2
    repeat_burst: int = 64 * 1024**2
    #: Requests of one member for sessions that are not open: each second on average, and at once. They open
    #: sessions or come late, and each costs the derivation of two keys.
    stray_rate: float = 250.0
    stray_burst: float = 1000.0
    #: Most bytes of requests that wait to be computed; further ones are refused.
    max_queued_bytes: int = 512 * 1024**2
    #: Seconds after which devices repeat a request that was refused because the queue is full.
    full_retry: float = 0.5
    #: Seconds after which a turn of the compute loop may count as hung: three heartbeats.
    hung_after: float = 3.0
