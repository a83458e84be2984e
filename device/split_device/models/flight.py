"""Steps of one session that are away at once: each is sent as if all tokens before it were right.

The next step leaves before the one in front is back, as in "PipeInfer" (arXiv 2407.11798). If it began at a wrong
token, it is void, and so is what comes back of it. The step that puts that right starts earlier, and the worker
cuts the session back to there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from split_common.models.codecs.base import Codec
from split_common.protocol import payloads
from split_device.models.cache import SessionCacheLayer
from split_device.models.prepared import PreparedStep, StepContext
from split_device.sessions.chunks import Chunk, ChunkRequest, encode
from split_device.sessions.places import PlacedRun
from split_device.sessions.requests import Reply, Request
from split_device.sessions.session import RemoteSession
from split_device.sessions.timings import StepTimings

#: Of how many of a session's latest steps the times count.
TIMES = 8

#: Most steps of one flight. What goes wrong counts for all of a flight, and its answers are held until it is over.
MOST_LEGS = 32


@dataclass(eq=False)
class Leg:
    """A step of a flight. The thread that made it may call it void, the session's thread sends it.

    Args:
        start: the index of its first token.
        tokens: how many it has.
        begins: whether it follows tokens that are all of the text; if not, it follows the leg before it.
        room: as `StepContext.room`.
    """

    start: int
    tokens: int
    begins: bool
    room: int | None
    #: Hidden states `[tokens, width]`, once it has left the head.
    states: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    #: Whether nobody waits for it any more. If it has not been sent, it never is.
    void: bool = False


@dataclass(frozen=True)
class Landed:
    """A flight is over: none of its legs is under way.

    Args:
        legs: how many it took.
        lost: those that were not answered, but for void ones that were given up.
        error: why; None if all others were void.
    """

    legs: int
    lost: list[Leg]
    error: Exception | None


class TripTimes:
    """How long the latest steps of a session took on the way and at the worker. One thread writes, any may read."""

    def __init__(self) -> None:
        self._trips: deque[float] = deque(maxlen=TIMES)
        self._worker: deque[float] = deque(maxlen=TIMES)

    def add(self, trip: float | None, worker: float) -> None:
        """Notes a step: seconds on the way, None if it waited for other steps, and seconds at the worker."""
        self._worker.append(worker)
        if trip is not None:
            self._trips.append(trip)

    @property
    def trip(self) -> float:
        """Seconds on the way, those of the fastest step; 0 before the first one."""
        return min(self._trips.copy(), default=0.0)

    @property
    def worker(self) -> float:
        """Seconds at the worker, those of the slowest step; 0 before the first one."""
        return max(self._worker.copy(), default=0.0)


class Flight:
    """Legs that are under way, and where further ones come from (a `GrowingStep`). One thread uses it.

    Args:
        layer: the session's.
        take_next: the next leg, without waiting; None if there is none. It raises SplitError once the request has
            ended.
        on_output: takes a leg and the body's output of it, `[tokens, width]`, in their order, as they come.
    """

    def __init__(
        self,
        layer: FlyingCacheLayer,
        take_next: Callable[[], Leg | None],
        on_output: Callable[[Leg, torch.Tensor], None],
    ) -> None:
        self.layer = layer
        self._take_next, self._on_output = take_next, on_output
        #: Legs that were taken, and are neither answered nor given up, in their order.
        self.under_way: deque[Leg] = deque()
        #: How many were taken, with those that are void, and how many of them are through.
        self.taken = self.through = 0
        #: How many requests the present worker was sent, and has not answered, or refused.
        self.unanswered = 0
        self._next: Leg | None = None

    @property
    def lost(self) -> list[Leg]:
        """Legs that were taken, and are neither answered nor given up."""
        return [*self.under_way, *([] if self._next is None else [self._next])]

    def peek(self) -> Leg | None:
        """The next leg that is not void; None if there is none now."""
        while self._next is None or self._next.void:
            self._next = self._take_next() if self.taken < MOST_LEGS else None
            if self._next is None:
                break
            self.taken += 1
        return self._next

    def take(self) -> Leg | None:
        """Takes the next leg, which is under way then."""
        if (leg := self.peek()) is not None:
            self.under_way.append(leg)
            self._next = None
        return leg

    def board(self, session: RemoteSession, timings: StepTimings) -> None:
        """The next requests go to this worker."""
        self.session, self.timings, self.unanswered = session, timings, 0

    def requests(self) -> LegRequests:
        """The requests of all legs under way, and of those that come, for a worker that has none of them.

        Void legs are given up: one that was refused would be refused again, and those behind it would be lost with
        it. All that is in front of a right one has landed.
        """
        self.under_way = deque(leg for leg in self.under_way if not leg.void)
        return LegRequests(self)

    def landed(self, leg: Leg, output: torch.Tensor) -> None:
        """A leg is through."""
        assert self.under_way.popleft() is leg
        self.through += 1
        self.layer.land(leg)
        self._on_output(leg, output)


@dataclass(frozen=True)
class _Message:
    """A request of a leg, and when it left, by `time.perf_counter`."""

    leg: Leg
    codec: Codec
    chunk: Chunk
    data: memoryview | bytes
    sent_at: float = 0.0


class LegRequests:
    """The messages of a flight (`split_device.sessions.requests.Requests`)."""

    #: Who adds a leg says so (`FlyingCacheLayer.nudge`), so nobody has to look.
    growing = False

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._sent: list[_Message] = []
        self._waiting: deque[_Message] = deque()
        self._outputs: list[torch.Tensor] = []
        for leg in flight.under_way:
            self._add(leg)

    @property
    def complete(self) -> bool:
        return not self._flight.under_way and self._flight.peek() is None

    def _add(self, leg: Leg) -> None:
        codec, requests = self._flight.layer.encoded(leg, self._flight.timings)
        self._waiting += [_Message(leg, codec, chunk, data) for chunk, data in requests]

    def take(self, wait: bool) -> Request | None:
        if not self._waiting and (leg := self._flight.take()) is not None:
            self._add(leg)
        if not self._waiting:
            return None
        message, channel = self._waiting.popleft(), self._flight.session.channel
        self._sent.append(replace(message, sent_at=time.perf_counter()))
        self._flight.unanswered += 1
        brief = self._flight.session.brief
        return message.chunk.request(None, message.codec, message.data, brief, channel.pads, channel.takes_trees)

    def answered(self, index: int, reply: Reply) -> None:
        message, flight = self._sent[index], self._flight
        leg = message.leg
        flight.unanswered -= 1
        with flight.timings.measure("decode"):
            output = message.chunk.output(*reply, message.codec, flight.session.brief)
        self._outputs.append(output.to(leg.states))
        if isinstance(result := reply[0], payloads.Result):
            worker = (result.body_us + result.worker_us) / 1e6
            seconds = time.perf_counter() - message.sent_at
            flight.layer.trip_times.add(seconds - worker if leg.begins else None, worker)
        if sum(map(len, self._outputs)) == leg.tokens:
            output, self._outputs = torch.cat(self._outputs), []
            flight.landed(leg, output)


class FlyingCacheLayer(SessionCacheLayer):
    """A session of one row without padding, which may have several steps under way."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: How long its latest steps took.
        self.trip_times = TripTimes()

    @property
    def can_fly(self) -> bool:
        """Whether several of its steps may be under way."""
        return not (self._traits.positions_interact or self._traits.axes is not None or self.indivisible)

    def fly(
        self,
        first: Leg,
        take_next: Callable[[], Leg | None],
        on_output: Callable[[Leg, torch.Tensor], None],
    ) -> Landed:
        """Runs a leg, and those that come meanwhile, until none is under way.

        Whoever adds a leg calls `nudge`. Legs that are answered are in the history; the others are lost if this
        fails, and the session holds what it held without them.

        Args:
            first: begins at the session's length, or earlier.
            take_next, on_output: as for a `Flight`.
        """
        later = [first]
        flight = Flight(self, lambda: later.pop() if later else take_next(), on_output)
        step, error = self._step_of(flight), None
        try:
            self._session.call(self, step)
        except Exception as failure:
            error = failure
        for count in range(flight.through):
            self.client.timings.record(StepTimings() if count else step.timings)
        return Landed(flight.taken, flight.lost, error)

    def nudge(self) -> None:
        """Makes a flight look for legs that have come. Any thread may call it."""
        self._session.nudge()

    def exchange(self, step: PreparedStep) -> torch.Tensor:
        output = super().exchange(step)
        seconds = step.timings.seconds
        self.trip_times.add(seconds["queue"], seconds["body"] + seconds["worker"])
        return output

    # --- what a flight asks --------------------------------------------------------------------------------

    def _step_of(self, flight: Flight) -> PreparedStep:
        """What the resilient session knows of a flight: no tokens of its own, and where its requests come from."""
        nothing = torch.empty(1, 0, 0)
        assert self._columns is not None
        codec, _ = StepContext().sizes(self.client.codec, 1, self.client.pad_steps)
        step = PreparedStep(nothing, nothing, self._columns, None, None, None, [], StepTimings(), codec)
        step.parts = flight
        return step

    def encoded(self, leg: Leg, timings: StepTimings) -> tuple[Codec, list[ChunkRequest]]:
        """The codec and the requests of a leg. Raises NonFinite if its states hold NaN or infinity."""
        codec, room = StepContext(room=leg.room).sizes(self.client.codec, 1, self.client.pad_steps)
        with timings.measure("encode"):
            return codec, encode(codec, [PlacedRun(0, leg.start, places_of(leg))], leg.states, None, room=room)

    def land(self, leg: Leg) -> None:
        """A leg is through: the session goes on after it."""
        self.crop(leg.start)
        assert self._columns is not None
        self._columns = torch.cat([self._columns, torch.ones(1, leg.tokens, dtype=torch.bool)], 1)
        self._history.append(leg.states[None], places_of(leg)[None])

    # --- what fail-over asks -------------------------------------------------------------------------------

    def send(self, session: RemoteSession, step: PreparedStep) -> list[Reply]:
        if isinstance(step.parts, Flight):
            step.parts.board(session, step.timings)
        return super().send(session, step)

    def is_spoilt(self, step: PreparedStep) -> bool:
        if isinstance(step.parts, Flight):
            # Those behind a refused one may have run.
            return step.parts.unanswered > 1
        return super().is_spoilt(step)

    def describe(self, step: PreparedStep) -> tuple[int, int, int]:
        if isinstance(step.parts, Flight):
            return 1, sum(leg.tokens for leg in step.parts.under_way), self.get_seq_length()
        return super().describe(step)


def places_of(leg: Leg) -> torch.Tensor:
    """The positions of a leg's tokens, `[tokens]`."""
    return torch.arange(leg.start, leg.start + leg.tokens)
