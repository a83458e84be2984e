"""Many requests at once on one device: a loop that batches their tokens through head and tail.

One thread computes. Each of its turns runs one forward of the tail over all rows that came back from workers,
chooses their tokens, and runs one forward of the head over all rows that go out. Each request has a session, and a
thread that waits for it and computes nothing.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from split_common.errors import Busy, PromptTooLong, SplitError, UnsupportedFeature
from split_common.system.forks import Birthplace
from split_device.generation.active import ActiveRequest, LegOutput, Outcome, OutputPart
from split_device.generation.active_requests import ActiveRequests
from split_device.generation.admission import Admission, Admitted
from split_device.generation.checking import Checked, check_drafts, prepare
from split_device.generation.drafting import Drafting
from split_device.generation.embedding import embed_next
from split_device.generation.first_tokens import FirstTokens, is_delayed
from split_device.generation.forced_tokens import accept_first
from split_device.generation.inbox import Inbox
from split_device.generation.limits import Limits
from split_device.generation.local_layers import KV_MEMORY, LocalLayers
from split_device.generation.placing import ImagePrompts, PlacedPrompt
from split_device.generation.prompt_scoring import PromptScorer
from split_device.generation.request import FinishReason, Generation, Logprobs, OnToken, Request
from split_device.generation.sampling import Sampler
from split_device.generation.stage import Stage
from split_device.sessions.notices import OnNotice

__all__ = ["Generation", "Generator", "Logprobs", "Request"]

log = logging.getLogger(__name__)

#: Seconds that `close` waits for sessions to be freed on their workers.
CLOSE_TIMEOUT = 2.0


class Generator:
    """Generates for many requests at once; a context manager. `close` ends its thread. Any thread may use it.

    Args:
        model: made by `SplitModelForCausalLM.from_pretrained`. Others may use it at the same time. It stays open.
        limits: how much runs at once.
        max_requests, kv_memory, prefix_cache, speculate: instead of those of the limits.
        tokenizer: whose tokens a draft model must have; None for the one beside the model.

    Raises:
        ConfigError: there is no such drafter.
        UnsupportedFeature: the model cannot speculate, and `speculate` names a drafter.
        ModelError: the memory does not suffice for one page of tokens.
    """

    def __init__(
        self,
        model: Any,
        *,
        limits: Limits | None = None,
        max_requests: int | None = None,
        kv_memory: int | None = None,
        prefix_cache: int | None = None,
        speculate: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        limits = (limits or Limits()).but(
            requests=max_requests, kv_memory=kv_memory, prefix_cache=prefix_cache, speculate=speculate
        )
        self._model, self._timings = model, model.split_parts.client.timings
        #: Forwards of head and tail and the rows in them, steps sent to workers, tokens chosen, and those drafted.
        self.counters: Counter[str] = Counter()
        self._layers = LocalLayers(model, limits.kv_memory if limits.kv_memory is not None else KV_MEMORY)
        self._images = ImagePrompts(model, self._layers.packed)
        self._head, self._tail = Stage(self._layers.head), Stage(self._layers.tail)
        self._inbox = Inbox()
        self._scorer = PromptScorer(self._layers.logits, self._layers.vocabulary)
        self._admission = Admission(self._head, self._tail, limits.requests)
        parts, stages = model.split_parts, (self._head, self._tail)
        returned = functools.partial(self._post, self._returned)
        self._requests = ActiveRequests(parts, self._layers, stages, self._admission, limits, returned)
        self._active = self._requests.by_generation
        self._first_tokens = FirstTokens(self._active.values())
        self._drafting = Drafting(model, self._layers, limits, self._active.values(), self.counters, tokenizer)
        #: Requests whose next tokens go to the head.
        self._entering: list[ActiveRequest] = []
        #: Outputs of the head, `[tokens, width]`, that go to workers.
        self._outgoing: list[tuple[ActiveRequest, torch.Tensor]] = []
        #: Outputs of workers, `[tokens, width]`, that go into the tail.
        self._arrived: list[tuple[ActiveRequest, torch.Tensor]] = []
        #: Outputs of the tail, `[1 + draft, width]`, of which tokens are chosen.
        self._ready: list[tuple[ActiveRequest, torch.Tensor]] = []
        #: Number of tokens that each request has at a worker.
        self._at_workers: dict[ActiveRequest, int] = {}
        #: Time at the start of this turn. All decisions of a turn use the same clock reading.
        self._now = time.monotonic()
        # Held while a request is handed to the loop, and while the loop is told to end.
        self._lock, self._closing = threading.Lock(), False
        self._birthplace = Birthplace("the generator")
        self._thread = threading.Thread(target=self._run, name="lambda-split-generator", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int | None:
        """Most tokens of one request for which head and tail have memory; None if they have no layers."""
        return self._layers.capacity

    def submit(
        self, request: Request, on_token: OnToken | None = None, on_notice: OnNotice | None = None
    ) -> Generation:
        """Queues a request. It begins when there is memory for it, and by priority.

        Args:
            on_token: called for each token on the generator's thread, so it should not take long. An exception that
                it raises ends the request.
            on_notice: takes one line of text when the request's worker is lost, waited for or found. Called on any
                thread, beside the connection's `on_notice`.

        Raises:
            UnsupportedFeature, UnknownAdapter, ConfigError, PromptTooLong: the request cannot be done.
            SplitError: the generator is closed.
            ForkedProcess: this process was forked since the generator was made.
        """
        self._birthplace.check()
        if request.images:
            self._images.check()
        cancel, adapter = functools.partial(self._post, self._cancel), self._layers.adapter(request.adapter)
        generation = Generation(request, on_token, cancel, on_notice, adapter)
        generation.speculate = self._drafting.choose(request.speculate)
        sampler = Sampler(self._model, request, self._layers.indivisible)
        tokens, capacity = sampler.max_length, self.capacity
        if capacity is not None and tokens > capacity:
            raise PromptTooLong(f"prompt and answer may take {tokens} tokens; kv_memory here holds {capacity}")
        if reason := sampler.finish_reason(generation.tokens):
            generation.finish(reason)
            return generation
        with self._lock:
            if self._closing:
                raise SplitError("the generator is closed")
            self._inbox.put(lambda: self._admission.add(generation, sampler))
        return generation

    def close(self) -> None:
        """Cancels all requests, and ends the thread. Does nothing in a forked child, which has no such thread."""
        if self._birthplace.is_elsewhere:
            return
        with self._lock:
            self._closing = True
        self._inbox.put(lambda: None)
        self._thread.join()
        self._images.close()
        self._requests.join(CLOSE_TIMEOUT)

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
        for request in list(self._active.values()):
            self._end(request, outcome)
        self._inbox.drain()
        for generation in self._admission.waiting():
            generation.finish(outcome)
        self._requests.close()

    def _turn(self) -> None:
        self._take_in()
        self._now = time.monotonic()
        self._admit()
        with self._timings.measure("tail"):
            self._enter_tail()
            self._run_tail()
        with self._timings.measure("sampling"):
            self._sample()
        with self._timings.measure("head"):
            self._enter_head()
            self._run_head()
        self._send_off()

    def _take_in(self) -> None:
        """Makes the calls in the inbox. Waits for one if there is nothing to compute, and for imminent replies."""
        urgent = self._first_tokens.urgent(self._now)
        can_enter = any(not is_delayed(request, urgent, self._now) for request, _ in self._arrived)
        idle = self._head.idle and self._tail.idle and self._scorer.idle and not (can_enter or self._ready)
        if idle and not (self._at_workers and self._inbox.empty and self._drafting.read()):
            times = self._first_tokens.delay_ends(request for request, _ in (*self._outgoing, *self._arrived))
            times += self._admission.pause_ends
            if not self._inbox.wait(min((at for at in times if at > self._now), default=None)):
                return
        self._inbox.gather(lambda: bool(self._at_workers))

    def _admit(self) -> None:
        """Begins waiting requests while there is memory for them, here and on the workers, and time."""
        if not self._requests.admit_all(self._now, self._begin):
            self._inbox.put(lambda: None)

    def _enter_tail(self) -> None:
        """Hands outputs of workers to the tail, except those that are delayed."""
        arrived, self._arrived, urgent = self._arrived, [], self._first_tokens.urgent(self._now)
        for request, states in arrived:
            if is_delayed(request, urgent, self._now):
                self._arrived.append((request, states))
            elif not request.ended:
                begin, request.tail_tokens = request.tail_tokens, request.tail_tokens + len(states)
                self._tail.add(request, request.sequences[1], begin, states, request)

    def _run_tail(self) -> None:
        for request, outcome in self._forward("tail", self._tail):
            if (states := self._states_of(request, outcome)) is not None:
                self._drafting.computed(request, states)
            if states is not None and request.parts_in_tail:
                request.parts_in_tail -= 1
            elif states is not None and not self._scorer.add(request, states):
                self._proceed(request, states[-1 - len(request.drafts) :])
        if (scored := self._scorer.run()) is not None:
            self._proceed(scored[0], scored[1][None])

    def _proceed(self, request: ActiveRequest, states: torch.Tensor) -> None:
        if request.awaits_first_token:
            self._entering += self._requests.prefixes.computed(request)
        if request.pending:
            self._entering.append(request)
        else:
            self._ready.append((request, states))

    def _sample(self) -> None:
        """Chooses the next tokens of requests whose steps are through."""
        ready, self._ready = prepare([each for each in self._ready if not each[0].ended])
        going: list[tuple[ActiveRequest, list[int]]] = []
        self._drafting.choosing()
        for checked in check_drafts(self._layers, ready):
            try:
                if self._advance(checked):
                    going.append((checked.request, checked.tokens[checked.matched :]))
            except Exception as error:
                self._end(checked.request, error)
        for request, failure in self._drafting.next_steps(going):
            if failure is not None:
                self._end(request, failure)
            self._entering.append(request)
            self._arrived += [(request, output) for output in request.take_early()]

    def _enter_head(self) -> None:
        """Embeds the next tokens of requests and hands them to the head."""
        entering, self._entering = [each for each in self._entering if not each.ended and each.pending], []
        for request, begin, states in embed_next(self._layers, entering):
            self._head.add(request, request.sequences[0], begin, states, request)

    def _run_head(self) -> None:
        for request, outcome in self._forward("head", self._head):
            if (states := self._states_of(request, outcome)) is not None:
                request.ready_since = time.monotonic()
                self._outgoing.append((request, states))

    def _send_off(self) -> None:
        """Sends states to workers, except those that are delayed."""
        outgoing = [(request, states) for request, states in self._outgoing if not request.ended]
        sent, self._outgoing = self._first_tokens.divide(outgoing, self._at_workers, self._now)
        for request, states in sent:
            self._at_workers[request] = self._at_workers.get(request, 0) + len(states)
            self.counters["steps"] += request.send(states)

    def _forward(self, end: str, stage: Stage) -> Iterator[tuple[ActiveRequest, Outcome]]:
        """Runs one forward, or several until the steps of requests that delay others are complete."""
        urgent = self._first_tokens.urgent(self._now)
        lowest = min((request.priority for request in self._active.values()), default=0)
        return stage.run(end, self.counters, lambda request: request.priority >= urgent > lowest)

    # --- a request -----------------------------------------------------------------------------------------

    def _begin(self, admitted: Admitted) -> None:
        # A worker may have shown it since the request came.
        admitted.sampler.indivisible = self._layers.indivisible
        if (outcome := accept_first(admitted.sampler, admitted.generation, self.counters)) is not None:
            self._admission.release(admitted.costs)
            admitted.generation.finish(outcome)
            return
        self._first_tokens.renew()
        for request in self._requests.begin(admitted):
            self._drafting.begun(request)
            if (asked := request.generation.request).images:
                self._images.start(asked, request.adapter, functools.partial(self._post, self._placed, request))
            else:
                self._entering.append(request)

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Has the loop make a call. Any thread may do that."""
        self._inbox.put(functools.partial(call, *arguments))

    def _placed(self, request: ActiveRequest, outcome: PlacedPrompt | Exception) -> None:
        """A prompt with images has been embedded."""
        if isinstance(outcome, Exception):
            self._end(request, outcome)
        else:
            request.placed = outcome
            self._entering.append(request)

    def _returned(self, request: ActiveRequest, outcome: Outcome) -> None:
        """A step has come back from its worker, or a part of one, or what is left of a flight."""
        if isinstance(outcome, OutputPart):
            if not request.ended:
                request.parts_in_tail += 1
                self._arrived.append((request, outcome.states))
            return
        lands, found = request.landing(outcome)
        if lands:
            self._at_workers.pop(request, None)
            self._requests.left(request, outcome)
        elif isinstance(outcome, LegOutput) and request in self._at_workers:
            self._at_workers[request] -= len(outcome.states)
        if found is None:
            return
        outcome = found
        divided = request.session.indivisible and not request.undivided
        if not request.ended and (divided or (isinstance(outcome, Busy) and len(self._active) > 1)):
            self._end(request, None)
            self._layers.indivisible |= divided
            self._admission.add(request.generation, request.sampler)
            if not divided:
                # The other requests will free memory on the workers.
                self._admission.pause(request.generation.adapter_name)
        elif isinstance(outcome, Busy | PromptTooLong | UnsupportedFeature) and request.has_draft:
            # The text itself may fit, and end before more is needed; and another worker may take no trees.
            self._forget_ahead(request)
            request.parts_to_send = 1
            self._outgoing.append((request, request.without_drafts()))
        elif (states := self._states_of(request, outcome)) is not None:
            request.ready_since = time.monotonic()
            if request.awaits_first_token:
                self._requests.prefixes.returned(request)
            self._arrived.append((request, states))

    def _states_of(self, request: ActiveRequest, outcome: Outcome) -> torch.Tensor | None:
        """The states of a step that has run; None if its request has ended. Ends it if the step has failed."""
        if isinstance(outcome, Exception):
            self._end(request, outcome)
            return None
        return outcome if isinstance(outcome, torch.Tensor) and not request.ended else None

    def _advance(self, checked: Checked) -> bool:
        """Goes on with a request's next tokens. Returns whether it has a next step."""
        if checked.error is not None:
            raise checked.error
        request = checked.request
        self.counters["tokens"] += len(checked.tokens)
        self._drafting.checked(checked)
        if not request.goes_on(checked.tokens, checked.matched):
            self._forget_ahead(request)
            request.drop_drafts(checked.path, (self._head.keep, self._tail.keep))
        if request.awaits_first_token:
            request.awaits_first_token = False
            self.counters["cached_tokens"] += request.generation.cached_tokens
            self._first_tokens.renew()
        if reason := request.sampler.finish_reason(request.generation.tokens):
            self._end(request, reason)
        return reason is None

    def _forget_ahead(self, request: ActiveRequest) -> None:
        """Takes back what a request has sent ahead, or was about to."""
        if request.legs is not None:
            self.counters["stale_tokens"] += request.legs.drop()
            self._head.cancel(request)
            self._outgoing = [each for each in self._outgoing if each[0] is not request]

    def _cancel(self, generation: Generation) -> None:
        if (request := self._active.get(generation)) is not None:
            self._end(request, "cancelled")
        generation.finish("cancelled")

    def _end(self, request: ActiveRequest, outcome: FinishReason | BaseException | None) -> None:
        """Frees everything that a request holds. With no outcome, its generation stays open: it begins again."""
        if request.ended:
            return
        stepping = self._at_workers.pop(request, None) is not None
        keep = isinstance(outcome, str) and not self._closing
        self._entering += self._requests.end(request, stepping, keep)
        # Wakes the loop: another request may begin.
        self._inbox.put(lambda: None)
        if outcome is not None:
            request.generation.finish(outcome)
