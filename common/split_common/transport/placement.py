"""Which worker a device gets: the policy of all transports. No I/O and no clock.

A device without a worker sends an `Open`, which waits as a `PendingOpen`. Each time that something changes,
`decide` says what happens to it, given all workers that are alive. Workers' claims are not believed far: much room
is worth little (`choose`), those that leave devices without an answer are passed over for a while (`Silences`), and
those that have never answered get one device at a time (`Trials`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, Literal, NamedTuple, TypeVar

import msgspec

from split_common.protocol import headers
from split_common.transport.base import FULL_RETRY
from split_common.transport.peer_id import peer_name

#: Seconds after which a device may try again when every worker was full.
BUSY_RETRY = 1.0

#: Most characters of a refusal's explanation.
MAX_DETAIL = 4096

#: Most names of workers in a refusal's explanation, for each model and its layers.
MAX_NAMES = 4

#: Room above this counts as this much: what a worker with the default limits has at most.
MAX_ROOM = 1024

#: Seconds after an open's deadline for which it is given again to workers that have not answered it. Then its
#: device is told who they are.
ANSWER_PATIENCE = 3.0

#: Seconds that a device has to get an answer from a worker that has not answered any device yet.
TRIAL = 60.0

#: Seconds for which a worker is passed over after it left a device without an answer: the first time, and at most.
#: Each time doubles them.
PASS_OVER = 5.0
MAX_PASS_OVER = 300.0

_Body = TypeVar("_Body")
_Key = TypeVar("_Key")


@dataclass
class PendingOpen(Generic[_Body]):
    """A device's `Open` that no worker has been given yet. A device has one at a time."""

    header: headers.Open
    #: The message, which is passed on unchanged.
    frames: tuple[bytes, _Body]
    #: Time at which the device is told to try again, by the clock of the caller of `decide`.
    deadline: float
    #: Whether any worker of its service can already take it, so it must not be assigned again.
    placed: bool = False


class Candidate(NamedTuple):
    """A worker that is alive, as it last announced itself."""

    id: bytes
    service: headers.Service
    model: str
    #: Further sessions that it can hold, if it is to be believed.
    room: int
    #: Name of the member that it is.
    member: str = ""
    #: Whether it has shown a certificate that holds for its service.
    certified: bool = True


class Assign(NamedTuple):
    """The open goes to this worker."""

    worker: bytes


class Wait(NamedTuple):
    """The open stays pending."""


class Refuse(NamedTuple):
    """A message is not delivered, and its sender is told why."""

    reason: Literal["no-worker", "busy", "gone", "full"]
    detail: str
    #: Seconds after which another attempt may succeed; 0 if waiting does not help.
    retry_after: float = 0.0

    def without(self, turned_away: Iterable[str]) -> Refuse:
        """The same, with the reasons why further workers were not let in."""
        return self._replace(detail="; not let in: ".join([self.detail, *turned_away]))

    def bounce(self, header: headers.Relay | headers.Open) -> headers.Bounce:
        """The message for the sender of a message with this header."""
        bounce = headers.Bounce(
            self.reason, header.channel, detail=self.detail[:MAX_DETAIL], retry_after=self.retry_after
        )
        if isinstance(header, headers.Open):
            return bounce
        return msgspec.structs.replace(
            bounce, session=header.session, epoch=header.epoch, seq=header.seq, peer=header.to
        )


#: Begins the reason why an open is refused if its device avoids every worker that there is.
NOBODY_ELSE = "there is no other worker"

#: The receiver of a message is not connected.
GONE = Refuse("gone", "the peer is not connected")


def full(why: str, retry_after: float = FULL_RETRY) -> Refuse:
    """The receiver of a message accepts nothing for the moment."""
    return Refuse("full", why, retry_after)


def decide(
    pending: PendingOpen[_Body],
    workers: Sequence[Candidate],
    early: bool,
    now: float,
    silent: Collection[str] = (),
    asked: Collection[bytes] = (),
    random: Random | None = None,
    tried: Collection[str] = (),
) -> Assign | Refuse | Wait:
    """What happens to an open. `choose` picks among the workers with room that the device does not avoid.

    Workers without a certificate are chosen if none with one has room, silent ones if there is no other, and those
    that are tried if there is no other, or none has room until the open's deadline.

    Args:
        pending: the open.
        workers: all that are alive, of every service.
        early: whether workers that are alive may be missing, because the queue has just started. While it is,
            no device is told that there is no worker, or none that it does not avoid.
        now: the time, by the same clock as the open's deadline.
        silent: names of the members that did not answer this device lately (`Silences`).
        asked: ids of the workers that were given this open before. Of silent ones, they come last.
        random: draws among workers; None for a source of its own.
        tried: names of the members that have to answer another device first (`Trials`).
    """
    serving = [worker for worker in workers if worker.service == pending.header.service]
    wanted = [worker for worker in serving if worker.id not in pending.header.avoid]
    answering = [worker for worker in wanted if worker.member not in silent]
    if wanted and not answering and now > pending.deadline + ANSWER_PATIENCE:
        return Refuse("busy", _silence(wanted), BUSY_RETRY)
    able = [worker for worker in answering or wanted if worker.room > 0]
    able = [worker for worker in able if worker.id not in asked] or able
    able = [worker for worker in able if worker.certified] or able
    if now <= pending.deadline and not _all_tried(answering, tried):
        able = [worker for worker in able if worker.member not in tried]
    if able and not pending.placed:
        return Assign(choose(able, random).id)
    if not serving:
        return Wait() if early else Refuse("no-worker", served(workers))
    if not (wanted or early):
        return Refuse("busy", NOBODY_ELSE, BUSY_RETRY)
    if now > pending.deadline:
        unheard = [worker for worker in wanted if worker.member in silent]
        why = f"{_silence(unheard)}, and every other worker is full" if unheard else "every worker is full"
        return Refuse("busy", why, BUSY_RETRY)
    return Wait()


def _all_tried(workers: Sequence[Candidate], tried: Collection[str]) -> bool:
    """Whether none of these workers may be waited for instead of one that is tried."""
    certified = [worker for worker in workers if worker.certified] or workers
    return all(worker.member in tried for worker in certified)


def choose(able: Sequence[Candidate], random: Random | None = None) -> Candidate:
    """The roomier of two members drawn at random, each by its roomiest worker; of equals, the first one.

    The power of two choices (Mitzenmacher, IEEE TPDS 12:10, 2001): nearly as even as the most room among all, but a
    member that claims more room than it has gets an open only when drawn, however many processes it runs.

    Args:
        able: at least one.
        random: draws the two; None for a source of its own.
    """
    roomiest: dict[str, int] = {}
    for index, worker in enumerate(able):
        if worker.member not in roomiest or _room(worker) > _room(able[roomiest[worker.member]]):
            roomiest[worker.member] = index
    drawn = sorted(roomiest.values())
    if len(drawn) > 2:
        drawn = sorted((random or _random).sample(drawn, 2))
    return max((able[index] for index in drawn), key=_room)


_random = Random()


def _room(worker: Candidate) -> int:
    return min(worker.room, MAX_ROOM)


def _silence(workers: Iterable[Candidate]) -> str:
    """That these workers did not answer."""
    names = ", ".join(sorted({repr(worker.member) for worker in workers}))
    return f"worker{'s' * (',' in names)} {names} did not answer"


@dataclass
class _Silence:
    #: How many times in a row, and until when it is passed over.
    times: int
    until: float


class Silences(Generic[_Key]):
    """Who leaves messages without an answer, and is passed over: each time for twice as long.

    Envoy calls this outlier ejection. An answer ends it at once, and so does time: one that is merely slow comes
    back. Not locked.

    Args:
        first, most: seconds for which one is passed over after the first time, and at most.
    """

    def __init__(self, first: float = PASS_OVER, most: float = MAX_PASS_OVER) -> None:
        self._first = first
        self._most = most
        self._known: dict[_Key, _Silence] = {}

    def __len__(self) -> int:
        return len(self._known)

    def note(self, key: _Key, now: float) -> None:
        """Notes that one did not answer. Counts once as long as it is passed over: messages may share one cause."""
        known = self._known.setdefault(key, _Silence(0, now))
        if now >= known.until:
            known.until = now + min(self._most, self._first * 2 ** min(known.times, 32))
            known.times += 1

    def end(self, key: _Key) -> None:
        """Notes that one has answered."""
        self._known.pop(key, None)

    def now(self, now: float) -> set[_Key]:
        """Those that are passed over at this time. Forgets those that have not been for `most` seconds."""
        for key in [key for key, known in self._known.items() if now >= known.until + self._most]:
            del self._known[key]
        return {key for key, known in self._known.items() if now < known.until}


class Trials:
    """Which workers' members must answer one device before others get them: those that never answered any.

    A worker can set up channels and then answer no request; a device notices that only after its step timeout. So
    such a worker gets one device at a time. Devices say who has answered; a worker cannot vouch for itself. Not
    locked.
    """

    def __init__(self) -> None:
        self._answered: set[str] = set()
        # By the worker's member: the device that has it, and until when it may be waited for.
        self._under_way: dict[str, tuple[bytes, float]] = {}
        self._silences: Silences[str] = Silences()

    def answered(self, member: str) -> None:
        """A device says that a worker of this member has answered a request."""
        self._answered.add(member)
        self._under_way.pop(member, None)
        self._silences.end(member)

    def given(self, member: str, device: bytes, now: float) -> None:
        """A device got a worker of this member."""
        if member not in self._answered:
            self._under_way.setdefault(member, (device, now + TRIAL))

    def asks_again(self, device: bytes, now: float) -> None:
        """A device wants another worker: the one that it has does not answer, or not enough."""
        for member in self._of(device):
            self._end(member, now)

    def forget(self, device: bytes) -> None:
        """A device is gone."""
        for member in self._of(device):
            del self._under_way[member]

    def now(self, now: float) -> set[str]:
        """The members that are tried by some device at this time, or did not answer the last one."""
        for member in [member for member, (_, until) in self._under_way.items() if now >= until]:
            self._end(member, now)
        return self._under_way.keys() | self._silences.now(now)

    def _of(self, device: bytes) -> list[str]:
        return [member for member, (tries, _) in self._under_way.items() if tries == device]

    def _end(self, member: str, now: float) -> None:
        del self._under_way[member]
        self._silences.note(member, now)


def served(workers: Iterable[Candidate]) -> str:
    """The models and parts of them that workers serve, and the workers' names, for a message."""
    services: dict[tuple[str, int, int], list[str]] = {}
    for worker in workers:
        service = worker.model, worker.service.first, worker.service.last
        services.setdefault(service, []).append(peer_name(worker.member, worker.id))
    return (
        ", ".join(
            f"{model} {first}:{last} ({_few(names)})" for (model, first, last), names in sorted(services.items())
        )
        or "none"
    )


def _few(names: list[str]) -> str:
    """Names for a message: some, and the number of further ones."""
    more = [f"{len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*sorted(names)[:MAX_NAMES], *more])
