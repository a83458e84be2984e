"""Which workers are on trial (`placement.Trials`), as devices tell each other over the server.

Workers cannot write these keys, so none can vouch for itself.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from split_common.transport.peer_id import mark_of, member_mark
from split_common.transport.placement import TRIAL
from split_common.transport.redis.answers import failed
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.server import RedisConnections

#: Seconds for which a device's word holds that a worker has answered, and after which the device repeats it.
ANSWERED_FOR = 86_400.0
REPEAT = 3600.0


class SharedTrials:
    """A device's view of all trials. For the housekeeping thread.

    Args:
        connections: to the server.
        keys: names of the fleet's keys.
    """

    def __init__(self, connections: RedisConnections, keys: Keys) -> None:
        self._connections = connections
        self._keys = keys
        # By the mark of a worker's member: when this device's word for it was written, by `time.monotonic`.
        self._vouched: dict[bytes, float] = {}

    def answered(self, workers: Iterable[bytes]) -> None:
        """Tells other devices which workers, by their ids, have answered this one."""
        now = time.monotonic()
        marks = {mark_of(worker) for worker in workers}
        self._vouched = {mark: at for mark, at in self._vouched.items() if now - at < REPEAT}
        news = marks - self._vouched.keys()
        lease = int(ANSWERED_FOR * 1000)
        keys = [self._keys.answered(mark) for mark in news]
        # A server without memory takes no word; the next heartbeat tries again.
        answers = self._connections.run_allowed([(key, ("SET", key, "", "PX", lease)) for key in keys])
        self._vouched |= {mark: now for mark, answer in zip(news, answers, strict=True) if not failed(answer)}

    def tried(self, members: Collection[str]) -> set[str]:
        """Those of the workers' members that have to answer another device first."""
        unknown = [member for member in members if member_mark(member) not in self._vouched]
        marks = [member_mark(member) for member in unknown]
        keys = [key for mark in marks for key in (self._keys.answered(mark), self._keys.trial(mark))]
        answers = self._connections.run_allowed([(key, ("EXISTS", key)) for key in keys])
        have_answered, under_way = answers[::2], answers[1::2]
        return {
            member
            for member, answered, trial in zip(unknown, have_answered, under_way, strict=True)
            if answered == 0 and trial == 1
        }

    def begin(self, member: str) -> bool:
        """Begins a trial of a worker's member, if it has answered nobody. False if another device was faster."""
        mark = member_mark(member)
        if mark in self._vouched:
            return True
        known, key = self._keys.answered(mark), self._keys.trial(mark)
        lease = int(TRIAL * 1000)
        answered, begun = self._connections.run_allowed(
            [(known, ("EXISTS", known)), (key, ("SET", key, "", "NX", "PX", lease))]
        )
        return answered != 0 or begun is not None
