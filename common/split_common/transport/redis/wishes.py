"""A device's wish for a worker, and the list of workers that it is answered by."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from split_common import headers
from split_common.errors import Malformed, SplitError
from split_common.keys import Role
from split_common.transport import OPEN_PATIENCE, count_dropped
from split_common.transport.redis.caller import Caller
from split_common.transport.redis.keys import Keys, entry
from split_common.transport.redis.server import Line, failed


def lane_sizes(line: Line, keys: Keys, role: Role, peers: Iterable[bytes]) -> dict[bytes, int]:
    """Bytes in the lanes of those of the peers that are alive."""
    peers = list(peers)
    lanes = [keys.lane(role, peer) for peer in peers]
    answers = line.run_allowed([(lane, ("MEMORY", "USAGE", lane)) for lane in lanes])
    return {peer: size for peer, size in zip(peers, answers, strict=True) if isinstance(size, int)}


def read_workers(
    line: Line, keys: Keys, counters: Counter[str]
) -> tuple[dict[bytes, headers.Announce], list[bytes]]:
    """The list of workers, dead ones among them, and the fields of it that are none."""
    (flat,) = line.run_allowed([(keys.workers, ("HGETALL", keys.workers))])
    if failed(flat):
        raise Malformed("the list of workers is no hash")
    announced, wrong = {}, []
    for name, value in zip(flat[::2], flat[1::2], strict=True):
        try:
            header = headers.decode_header(value)
            if not isinstance(header, headers.Announce) or header.sender.hex().encode() != name:
                raise Malformed("an announcement of another peer")
            announced[header.sender] = header
        except SplitError as error:
            wrong.append(name)
            count_dropped(counters, error)
    return announced, wrong


@dataclass
class Wish:
    """A device's wish for a worker."""

    header: headers.Open
    body: bytes
    #: Whether it waits in the stream that all workers of the service read.
    placed: bool = False
    deadline: float = field(default_factory=lambda: time.monotonic() + OPEN_PATIENCE)


class Wishes:
    """One device's wishes, of which it has one at a time. Used by the keeper's thread, but for `answered`."""

    def __init__(self, line: Line, keys: Keys, caller: Caller, counters: Counter[str]) -> None:
        self._line = line
        self._keys = keys
        self._caller = caller
        self._counters = counters
        self._wish: Wish | None = None

    @property
    def waiting(self) -> bool:
        return self._wish is not None

    def take(self, wish: Wish) -> None:
        """A new wish, or the same again, which waits no longer for that."""
        if self._wish is None or self._wish.header.channel != wish.header.channel:
            self._wish = wish

    def answered(self, channel: int) -> None:
        """A worker has answered the wish for this channel."""
        wish = self._wish
        if wish is not None and wish.header.channel == channel:
            self._wish = None

    def answer(self, early: bool) -> None:
        """Hands the wish to the workers of its service, or tells the device that it cannot be met, or not soon.

        Args:
            early: whether workers that are alive may be missing.
        """
        wish = self._wish
        if wish is None:
            return
        header = wish.header
        workers = [worker for worker in self._workers() if worker.service == header.service]
        able = [worker for worker in workers if worker.room > 0 and worker.sender not in header.avoid]
        if not workers and not early:
            self._refuse(wish, "no-worker", self._served(), 0.0)
        elif workers and all(worker.sender in header.avoid for worker in workers) and not early:
            self._refuse(wish, "busy", "every worker is full", 1.0)
        elif wish.placed and not self._waits(wish):
            self._done(wish)
        elif not wish.placed and able:
            self._place(wish, able)
        elif workers and time.monotonic() > wish.deadline:
            self._refuse(wish, "busy", "every worker is full", 1.0)

    def _workers(self) -> list[headers.Announce]:
        """The announcements of all workers that are alive."""
        announced, _ = read_workers(self._line, self._keys, self._counters)
        alive = lane_sizes(self._line, self._keys, "worker", announced)
        return [worker for peer, worker in announced.items() if peer in alive]

    def _place(self, wish: Wish, able: list[headers.Announce]) -> None:
        message = entry(headers.encode_header(wish.header), wish.body)
        if wish.header.avoid:
            # Not to all workers: one that is to be avoided would have to pass it on.
            roomiest = max(able, key=lambda worker: worker.room)
            lane = self._keys.lane("worker", roomiest.sender)
            (id_,) = self._line.run_allowed([(lane, ("XADD", lane, "NOMKSTREAM", "*", *message))])
            if isinstance(id_, bytes):
                self._done(wish)
        else:
            opens = self._keys.opens(wish.header.service)
            (id_,) = self._line.run_allowed([(opens, ("XADD", opens, "NOMKSTREAM", "*", *message))])
            wish.placed = isinstance(id_, bytes)

    def _waits(self, wish: Wish) -> bool:
        """Whether a wish may still be in the stream; workers take from it what they read."""
        opens = self._keys.opens(wish.header.service)
        (length,) = self._line.run_allowed([(opens, ("XLEN", opens))])
        return isinstance(length, int) and length > 0

    def _served(self) -> str:
        services = {(worker.model, worker.service) for worker in self._workers()}
        names = {f"{model} layers {service.first}:{service.last}" for model, service in services if service}
        return ", ".join(sorted(names)) or "none"

    def _refuse(self, wish: Wish, reason: Any, detail: str, retry_after: float) -> None:
        self._done(wish)
        self._counters[f"bounced_{reason}"] += 1
        bounce = headers.Bounce(reason, wish.header.channel, detail=detail[:4096], retry_after=retry_after)
        self._caller.message(bounce, b"")

    def _done(self, wish: Wish) -> None:
        if self._wish is wish:
            self._wish = None
