"""The requests that run: each begins with a session and sequences in head and tail, and frees them when it ends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from split_common.engine.scheduler import DECODE_TOKENS
from split_device.generation.active import ActiveRequest, Outcome
from split_device.generation.admission import Admission, Admitted, is_further
from split_device.generation.limits import Limits
from split_device.generation.local_layers import LocalLayers
from split_device.generation.prefixes import Prefixes
from split_device.generation.request import Generation
from split_device.generation.stage import Stage
from split_device.generation.turn_time import TurnTime
from split_device.models.flight import FlyingCacheLayer
from split_device.speculation.drafters import TREE_TOKENS, has_branches
from split_device.speculation.names import MTP, OFF


def _room(generation: Generation, layers: LocalLayers) -> int:
    """The tokens for which a request's decoding steps have room: several for drafts, or what a grammar forces."""
    if layers.indivisible or (generation.speculate == OFF and generation.request.constraint is None):
        return 1
    trees = has_branches(generation.speculate) and layers.takes_trees and not generation.request.images
    return TREE_TOKENS if trees else DECODE_TOKENS


class ActiveRequests:
    """Begins and ends requests, each with a thread that waits for its session. One thread uses it.

    Args:
        parts: the model's `split_parts`.
        layers: head and tail, which run in the two stages.
        stages: where sequences are made and freed, head and tail.
        admission: where memory was reserved for the requests.
        limits: how many requests share the memory of histories, and how much is kept of ended ones.
        on_outcome: called on a session's thread after each of its steps.
    """

    def __init__(
        self,
        parts: Any,
        layers: LocalLayers,
        stages: tuple[Stage, Stage],
        admission: Admission,
        limits: Limits,
        on_outcome: Callable[[ActiveRequest, Outcome], None],
    ) -> None:
        self._parts = parts
        self._layers = layers
        self._stages = stages
        self._admission = admission
        self._history_memory = parts.history_memory // limits.requests
        self._on_outcome = on_outcome
        self._threads: list[threading.Thread] = []
        self.prefixes = Prefixes(parts, layers, stages, limits.prefix_cache)
        #: Those that have not ended.
        self.by_generation: dict[Generation, ActiveRequest] = {}
        #: Those that have ended while a step was at a worker, after which what they hold is kept.
        self._leaving: set[ActiveRequest] = set()

    def admit(self, now: float) -> Admitted | None:
        """Takes out the next request that may begin; None if there is none.

        While workers are too full for a request that runs, none with its adapter begins, and none at all if it has
        no adapter: it would take the room that the other waits for.
        """
        full = {each.adapter_name for each, request in self.by_generation.items() if request.session.waits_for_room}
        return self._admission.admit(len(self.by_generation), now, full, sum(map(is_further, self.by_generation)))

    def admit_all(self, now: float, begin: Callable[[Admitted], None]) -> bool:
        """Begins the requests that may, as far as there is time: a slow grammar is looked at when one begins.

        Returns:
            Whether none is left that may begin.
        """
        with TurnTime() as turn:
            while (admitted := self.admit(now)) is not None:
                begin(admitted)
                if turn.over:
                    return False
        return True

    def begin(self, admitted: Admitted) -> list[ActiveRequest]:
        """Makes a request active; its first tokens are pending.

        Returns:
            The request; nothing if it waits until another one has computed its beginning.
        """
        generation = admitted.generation
        prompt, done = generation.request.prompt, generation.tokens
        first = prompt if self._layers.indivisible else [*prompt, *done]
        later = [[token] for token in done] if self._layers.indivisible else []
        head, tail = (stage.new_sequence() for stage in self._stages)
        request = ActiveRequest(
            generation,
            admitted.sampler,
            self._new_session(generation),
            (head, tail),
            admitted.costs,
            deque([first, *later]),
            len(first),
            self._layers.indivisible,
            self._layers.tail is None
            and generation.request.prompt_logprobs is None
            and generation.speculate != MTP,
            _room(generation, self._layers),
        )
        generation.session = request.session.identity.label
        self.by_generation[generation] = request
        thread = threading.Thread(
            target=request.session_loop, args=(self._on_outcome,), name="lambda-split-session", daemon=True
        )
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        thread.start()
        may_enter = self.prefixes.find(request)
        self.prefixes.make_room(self.by_generation.values())
        return [request] if may_enter else []

    def _new_session(self, generation: Generation) -> FlyingCacheLayer:
        return FlyingCacheLayer(
            self._parts.client,
            self._parts.traits,
            history_memory=self._history_memory,
            request_id=generation.request_id,
            index=generation.request.index,
            on_notice=generation.on_notice,
            adapter=generation.adapter.request if generation.adapter is not None else None,
        )

    def end(self, request: ActiveRequest, stepping: bool, keep: bool) -> list[ActiveRequest]:
        """Frees everything that a request holds, or keeps it for later requests.

        Args:
            stepping: whether a step of it is at a worker, for which nobody waits any more.
            keep: whether to keep it if possible: once the step is back, if that is one of a few tokens.

        Returns:
            Requests that have waited for it and may enter the head.
        """
        request.ended = True
        if request.legs is not None:
            request.legs.drop()
        if request.speculation is not None:
            request.speculation.ended()
        del self.by_generation[request.generation]
        for stage in self._stages:
            stage.cancel(request)
        leaves = keep and stepping and not request.awaits_first_token and self.prefixes.can_cut_back(request)
        kept, released = self.prefixes.ended(request, keep and not stepping)
        if leaves:
            self._leaving.add(request)
            request.session.abandon(at_once=False)
        else:
            self._free(request, kept, stepping)
        return released

    def left(self, request: ActiveRequest, outcome: Outcome) -> None:
        """The step of a request has come back. If the request has left, what it holds is kept or freed."""
        if request in self._leaving:
            self._leaving.remove(request)
            self._free(request, not isinstance(outcome, Exception) and self.prefixes.keep(request), False)

    def _free(self, request: ActiveRequest, kept: bool, stepping: bool) -> None:
        for sequence in request.sequences:
            if sequence is not None and not kept:
                sequence.free()
        self._admission.release(request.costs)
        if stepping:
            request.session.abandon()
        request.outbox.put(None)

    def close(self) -> None:
        """Frees what ended requests hold."""
        while self._leaving:
            self._free(self._leaving.pop(), False, True)
        self.prefixes.clear()

    def join(self, timeout: float) -> None:
        """Waits for sessions that have ended to be freed on their workers, for at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
