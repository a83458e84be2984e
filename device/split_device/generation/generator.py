"""Many requests at once, through head and tail too: the loop of a device that works for many.

One thread computes. Each of its turns runs one forward of the tail over all rows that came back from workers,
chooses their tokens, and runs one forward of the head over all that go out. Each request has a session of its own;
a thread for each, which computes nothing, waits for it.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from split_common.engine.scheduler import is_prefill
from split_common.engine.sequences import KVSequence
from split_common.errors import Busy, PromptTooLong, SplitError
from split_device.generation.limits import Limits
from split_device.generation.local_layers import KV_MEMORY, LocalLayers
from split_device.generation.request import FinishReason, Generation, Logprobs, OnToken, Request
from split_device.generation.sampling import Sampler
from split_device.generation.stage import Stage
from split_device.models.cache import SessionCacheLayer, StepContext

__all__ = ["Generation", "Generator", "Logprobs", "Request"]

log = logging.getLogger(__name__)

#: One in so many of these places is kept for requests of a priority above 0.
KEPT_FREE = 8

#: Tokens of prompts that are at workers at once, or those of one prompt: who comes later with a higher priority
#: waits for no more than these.
PREFILL_AWAY = 1024

#: While more tokens of prompts than this have brought no first token, requests of no priority do not decode: a
#: worker takes many prompts faster when nobody decodes beside them, and then many decode together.
RUSH = 512

#: Seconds for which a request is held back for others' first tokens that do not come, and at most each time, though
#: they come.
HOLD = 5.0

#: Seconds of silence after which no more replies are waited for before the next forward.
GATHER = 0.003

#: Seconds that replies are gathered for at most.
MAX_GATHER = 0.05

#: Seconds until a request is tried again for which no worker had room.
NO_ROOM_RETRY = 1.0

#: Seconds that closing waits for sessions to be freed on their workers.
CLOSE_TIMEOUT = 2.0


@dataclass(eq=False)
class ActiveRequest:
    """A request that has rows in both ends and a session."""

    generation: Generation
    sampler: Sampler
    session: SessionCacheLayer
    sequences: tuple[KVSequence | None, KVSequence | None]
    costs: tuple[int, int]
    #: What is to go through the model: tokens that go together.
    pending: deque[list[int]]
    #: Tokens of the first of these.
    prompt: int
    #: Whether it has chosen no token yet.
    fresh: bool = True
    #: Tokens that went into the head, and into the tail.
    entered: int = 0
    left: int = 0
    #: Since when what it has could go on: to a worker, or into the tail.
    waits_since: float = 0.0
    ended: bool = False
    #: States for the worker; None ends the courier.
    outbox: queue.SimpleQueue[torch.Tensor | None] = field(default_factory=queue.SimpleQueue)

    @property
    def priority(self) -> int:
        return self.generation.request.priority


class Generator:
    """Generates for many requests at once; a context manager. Its thread ends with `close`.

    Args:
        model: what `SplitModelForCausalLM.from_pretrained` gives; it may be used besides, and outlives this.
        limits: how much runs at once.
        max_requests, kv_memory: instead of the limits' `requests` and `kv_memory`.

    Raises:
        ModelError: the memory holds not even one page of tokens.
    """

    def __init__(
        self,
        model: Any,
        *,
        limits: Limits | None = None,
        max_requests: int | None = None,
        kv_memory: int | None = None,
    ) -> None:
        limits = limits or Limits()
        max_requests = limits.requests if max_requests is None else max_requests
        kv_memory = limits.kv_memory if kv_memory is None else kv_memory
        self._model = model
        parts = model.split_parts
        self._client, self._traits = parts.client, parts.traits
        self._max_requests = max_requests
        self._kept_free = max_requests // KEPT_FREE
        self._ends = LocalLayers(model, kv_memory if kv_memory is not None else KV_MEMORY)
        self._head, self._tail = Stage(self._ends.head), Stage(self._ends.tail)
        #: What others want the loop's thread to do.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        #: Requests that wait to begin, those of the highest priority and the oldest first.
        self._waiting: list[tuple[int, int, Generation, Sampler]] = []
        self._order = itertools.count()
        self._flights: dict[Generation, ActiveRequest] = {}
        #: Requests whose next tokens go to the head.
        self._entering: list[ActiveRequest] = []
        #: What has come back from workers, to go into the tail.
        self._arrived: list[tuple[ActiveRequest, torch.Tensor]] = []
        #: What the head has made, to go to the workers; what has come through the tail, to be sampled.
        self._outgoing: list[tuple[ActiveRequest, torch.Tensor]] = []
        self._ready: list[tuple[ActiveRequest, torch.Tensor]] = []
        #: Tokens of each request that are at a worker.
        self._away: dict[ActiveRequest, int] = {}
        self._paused_until = 0.0
        self._held_until = 0.0
        #: The time in this turn: what it decides to wait for, the next one finds in the future or lets go.
        self._now = time.monotonic()
        self._couriers: list[threading.Thread] = []
        # Joins a request to a loop that still runs.
        self._lock = threading.Lock()
        self._closing = False
        #: Forwards of each end and the rows in them, steps that went to workers, and tokens that were chosen.
        self.counters: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="lambda-split-generator", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_token: OnToken | None = None) -> Generation:
        """Begins a request as soon as there is room for it.

        Args:
            on_token: is told of each token, on the generator's thread: it should not take long. What it raises
                ends the request.

        Raises:
            UnsupportedFeature, ConfigError, PromptTooLong: the request cannot be done.
        """
        generation = Generation(request, on_token, self._cancel)
        sampler = Sampler(self._model, request)
        tokens = self._tokens(generation, sampler)
        if self._ends.capacity is not None and tokens > self._ends.capacity:
            raise PromptTooLong(f"{tokens} tokens exceed this device's memory for {self._ends.capacity}")
        if reason := self._over(generation, sampler):
            generation.finish(reason)
            return generation
        with self._lock:
            if self._closing:
                raise SplitError("the generator is closed")
            self._inbox.put(lambda: self._enqueue(generation, sampler))
        return generation

    def close(self) -> None:
        """Cancels what is under way or waits, and ends the thread."""
        with self._lock:
            self._closing = True
        self._inbox.put(lambda: None)
        self._thread.join()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for courier in self._couriers:
            courier.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the loop ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        outcome: FinishReason | BaseException = "cancelled"
        try:
            while not self._closing:
                self._turn()
        except BaseException as error:
            log.debug("the generator failed", exc_info=error)
            outcome = error
            with self._lock:
                self._closing = True
        for flight in list(self._flights.values()):
            self._end(flight, outcome)
        while not self._inbox.empty():
            self._inbox.get()()
        for *_, generation, _ in self._waiting:
            generation.finish(outcome)

    def _turn(self) -> None:
        self._take_in()
        self._now = time.monotonic()
        self._admit()
        self._enter_tail()
        self._run_tail()
        self._sample()
        self._embed()
        self._run_head()
        self._send_off()

    def _run_head(self) -> None:
        for flight, outcome in self._forward("head", self._head):
            self._headed(flight, outcome)

    def _run_tail(self) -> None:
        for flight, outcome in self._forward("tail", self._tail):
            self._tailed(flight, outcome)

    def _forward(self, end: str, stage: Stage) -> Iterator[tuple[ActiveRequest, torch.Tensor | Exception]]:
        """Runs one forward, or more until requests in favour of which others are delayed are through.

        Yields:
            What became of each step that is over: states `[tokens, width]`, or an error.
        """
        urgent = self._urgent
        lowest = min((flight.priority for flight in self._flights.values()), default=0)
        while True:
            rows, outcomes = stage.forward()
            yield from outcomes
            if not rows:
                return
            self.counters[f"{end}_forwards"] += 1
            self.counters[f"{end}_rows"] += rows
            if urgent <= lowest or not any(flight.priority >= urgent for flight in stage.busy()):
                return

    def _take_in(self) -> None:
        """Does what others want done; waits if there is nothing else to do, or for replies that come just now."""
        urgent = self._urgent
        if self._head.idle and self._tail.idle and all(self._yields(flight, urgent) for flight, _ in self._arrived):
            times = [self._paused_until] * bool(self._waiting)
            for flight, _ in (*self._outgoing, *self._arrived):
                times += [self._held_until, flight.waits_since + HOLD]
            wake = min((time_ for time_ in times if time_ > self._now), default=None)
            try:
                self._inbox.get(timeout=None if wake is None else max(0.0, wake - time.monotonic()))()
            except queue.Empty:
                return
        until = time.monotonic() + MAX_GATHER
        while True:
            try:
                self._inbox.get(timeout=GATHER if self._away and time.monotonic() < until else 0.0)()
            except queue.Empty:
                return

    # --- requests begin and end ----------------------------------------------------------------------------

    def _enqueue(self, generation: Generation, sampler: Sampler) -> None:
        heapq.heappush(self._waiting, (-generation.request.priority, next(self._order), generation, sampler))

    def _admit(self) -> None:
        """Begins requests that wait, while there is room."""
        while self._waiting and self._now >= self._paused_until:
            *_, generation, sampler = self._waiting[0]
            kept_free = self._kept_free if generation.request.priority <= 0 else 0
            tokens = self._tokens(generation, sampler)
            costs = self._head.cost(tokens), self._tail.cost(tokens)
            fits = costs[0] <= self._head.room and costs[1] <= self._tail.room
            if generation.done:
                heapq.heappop(self._waiting)
            elif fits and len(self._flights) < self._max_requests - kept_free:
                heapq.heappop(self._waiting)
                self._begin(generation, sampler, costs)
            else:
                return

    def _begin(self, generation: Generation, sampler: Sampler, costs: tuple[int, int]) -> None:
        request, done = generation.request, generation.tokens
        # What was decoded token by token may not be the same when it goes through together.
        later = [[token] for token in done] if self._ends.indivisible else []
        first = request.prompt if self._ends.indivisible else [*request.prompt, *done]
        flight = ActiveRequest(
            generation,
            sampler,
            SessionCacheLayer(
                self._client, self._traits, history_memory=self._client.history_memory // self._max_requests
            ),
            (self._new_sequence(self._head), self._new_sequence(self._tail)),
            costs,
            deque([first, *later]),
            len(first),
        )
        self._head.room -= costs[0]
        self._tail.room -= costs[1]
        self._flights[generation] = flight
        self._held_until = time.monotonic() + HOLD
        courier = threading.Thread(target=self._carry, args=(flight,), name="lambda-split-courier", daemon=True)
        self._couriers = [*filter(threading.Thread.is_alive, self._couriers), courier]
        courier.start()
        self._entering.append(flight)

    @staticmethod
    def _new_sequence(stage: Stage) -> KVSequence | None:
        return stage.runner.store.new_sequence() if stage.runner is not None else None

    @staticmethod
    def _tokens(generation: Generation, sampler: Sampler) -> int:
        """Tokens that a request may have in the end."""
        return len(generation.request.prompt) + sampler.limit

    def _over(self, generation: Generation, sampler: Sampler) -> FinishReason | None:
        """Why a request needs no more tokens; None if it does."""
        tokens = generation.tokens
        if tokens and sampler.ends(tokens[-1]):
            return "stop"
        return "length" if len(tokens) >= sampler.limit else None

    def _cancel(self, generation: Generation) -> None:
        def cancel() -> None:
            if (flight := self._flights.get(generation)) is not None:
                self._end(flight, "cancelled")
            generation.finish("cancelled")

        self._inbox.put(cancel)

    def _end(self, flight: ActiveRequest, outcome: FinishReason | BaseException | None) -> None:
        """Frees all that a request has; with no outcome it will begin again."""
        if flight.ended:
            return
        flight.ended = True
        del self._flights[flight.generation]
        for stage, sequence, cost in zip((self._head, self._tail), flight.sequences, flight.costs, strict=True):
            if stage.runner is not None and sequence is not None:
                stage.scheduler.cancel(flight)
                sequence.free()
                stage.room += cost
        if self._away.pop(flight, None) is not None:
            flight.session.abandon()
        flight.outbox.put(None)
        # Another one may begin in its place.
        self._inbox.put(lambda: None)
        if outcome is not None:
            flight.generation.finish(outcome)

    # --- the way of a request's tokens ---------------------------------------------------------------------

    def _embed(self) -> None:
        """Hands the next tokens of requests to the head; what is decoded, all together."""
        entering, self._entering = [flight for flight in self._entering if not flight.ended], []
        decoding = [flight for flight in entering if len(flight.pending[0]) == 1]
        for flights in ([decoding] if decoding else []) + [
            [flight] for flight in entering if flight not in decoding
        ]:
            parts = [flight.pending.popleft() for flight in flights]
            begins = [flight.entered for flight in flights]
            positions = [
                begin + index for begin, part in zip(begins, parts, strict=True) for index in range(len(part))
            ]
            states = self._ends.embed([token for part in parts for token in part], positions)
            for flight, begin, mine in zip(flights, begins, torch.split(states, [*map(len, parts)]), strict=True):
                flight.entered += len(mine)
                self._head.add(flight, flight.sequences[0], begin, mine)

    def _headed(self, flight: ActiveRequest, outcome: torch.Tensor | Exception) -> None:
        if self._goes_on(flight, outcome):
            assert isinstance(outcome, torch.Tensor)
            flight.waits_since = time.monotonic()
            self._outgoing.append((flight, outcome))

    def _send_off(self) -> None:
        """Sends states to the workers, but not too many prompts at once, and not what is held back."""
        kept: list[tuple[ActiveRequest, torch.Tensor]] = []
        urgent = self._urgent
        prompts = sum(flight.prompt for flight in self._flights.values() if flight.fresh)
        rush = prompts > RUSH and self._now < self._held_until
        prefill = sum(tokens for tokens in self._away.values() if is_prefill(tokens))
        for flight, states in sorted(self._outgoing, key=lambda each: -each[0].priority):
            tokens = len(states)
            if flight.ended:
                continue
            crowded = is_prefill(tokens) and prefill > 0 and prefill + tokens > PREFILL_AWAY
            rushed = rush and flight.priority <= 0 and not flight.fresh
            if crowded or self._yields(flight, math.inf if rushed else urgent):
                kept.append((flight, states))
                continue
            prefill += tokens if is_prefill(tokens) else 0
            self._away[flight] = tokens
            self.counters["steps"] += 1
            flight.outbox.put(states)
        self._outgoing = kept

    def _carry(self, flight: ActiveRequest) -> None:
        """A courier's thread: takes states to the worker and brings back what it made of them."""
        while (states := flight.outbox.get()) is not None:
            outcome: torch.Tensor | Exception
            try:
                with torch.inference_mode():
                    outcome = flight.session.step(states[None], StepContext())[0]
            except Exception as error:
                outcome = error
            self._inbox.put(functools.partial(self._returned, flight, outcome))
        flight.session.reset()

    def _returned(self, flight: ActiveRequest, outcome: torch.Tensor | Exception) -> None:
        self._away.pop(flight, None)
        if isinstance(outcome, Busy) and not flight.ended and len(self._flights) > 1:
            # Those that run make room some time.
            self._end(flight, None)
            self._enqueue(flight.generation, flight.sampler)
            self._paused_until = time.monotonic() + NO_ROOM_RETRY
        elif self._goes_on(flight, outcome):
            assert isinstance(outcome, torch.Tensor)
            flight.waits_since = time.monotonic()
            self._arrived.append((flight, outcome))

    @property
    def _urgent(self) -> float:
        """The highest priority of requests that wait for their first tokens, for which lower ones are held back."""
        fresh = [flight.priority for flight in self._flights.values() if flight.fresh]
        return max(fresh) if fresh and self._now < self._held_until else -math.inf

    def _yields(self, flight: ActiveRequest, urgent: float) -> bool:
        """Whether a request is held back for those of this priority."""
        return flight.priority < urgent and self._now < flight.waits_since + HOLD

    def _enter_tail(self) -> None:
        """Hands what has come back to the tail, but for what is held back."""
        arrived, self._arrived, urgent = self._arrived, [], self._urgent
        for flight, states in arrived:
            if self._yields(flight, urgent):
                self._arrived.append((flight, states))
            elif not flight.ended:
                begin, flight.left = flight.left, flight.left + len(states)
                self._tail.add(flight, flight.sequences[1], begin, states)

    def _tailed(self, flight: ActiveRequest, outcome: torch.Tensor | Exception) -> None:
        if self._goes_on(flight, outcome):
            assert isinstance(outcome, torch.Tensor)
            if flight.pending:
                self._entering.append(flight)
            else:
                self._ready.append((flight, outcome[-1]))

    def _goes_on(self, flight: ActiveRequest, outcome: torch.Tensor | Exception) -> bool:
        """Whether a request is still under way; ends it if a step has failed."""
        if isinstance(outcome, Exception):
            self._end(flight, outcome)
        return not flight.ended

    def _sample(self) -> None:
        """Chooses the next token of each row that is through, and sends it into the head."""
        ready = [(flight, state) for flight, state in self._ready if not flight.ended]
        self._ready = []
        if not ready:
            return
        logits = self._ends.logits(torch.stack([state for _, state in ready]))
        for (flight, _), row, likeliest in zip(ready, logits, logits.argmax(-1).tolist(), strict=True):
            try:
                self._advance(flight, row, likeliest)
            except Exception as error:
                self._end(flight, error)

    def _advance(self, flight: ActiveRequest, logits: torch.Tensor, likeliest: int) -> None:
        sampler, generation = flight.sampler, flight.generation
        token, logprobs = (likeliest, None) if sampler.plain else sampler.choose(logits)
        sampler.accept(token)
        if flight.fresh:
            flight.fresh = False
            self._held_until = time.monotonic() + HOLD
        generation.add(token, logprobs, sampler.state)
        self.counters["tokens"] += 1
        if reason := self._over(generation, sampler):
            self._end(flight, reason)
        else:
            flight.pending.append([token])
            self._entering.append(flight)
