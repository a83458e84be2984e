"""How much a worker takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerLimits:
    """What bounds a worker's sessions and queue, beside memory for keys and values."""

    #: Sessions held at once.
    max_sessions: int = 1024
    #: Seconds without a request after which a session is closed.
    idle_timeout: float = 900.0
    #: Seconds without a request after which a session may be evicted in favour of another one.
    evict_after: float = 10.0
    #: Tokens that each session is expected to grow by: a new one is admitted only if there is memory for that.
    growth: int = 64
    #: Bytes of replies, in all sessions, that are kept to be sent again. If there are more, the least recently used
    #: sessions lose theirs.
    max_replies: int = 1024**3
    #: Bytes of new replies after which all of them are counted.
    count_replies_every: int = 128 * 1024**2
    #: Bytes of requests that may wait to be computed; further ones are refused.
    max_queued_bytes: int = 512 * 1024**2
    #: Seconds after which devices send such a request again.
    full_retry: float = 0.5
    #: Seconds after which a turn of the compute loop may count as hung: three heartbeats.
    hung_after: float = 3.0
