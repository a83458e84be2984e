"""Requests that begin with what others have computed: ended ones, and those that run.

A request whose longest known beginning is being computed waits for that, and not for the tokens that are generated
after it. It only waits for requests that began before it, so that no two wait for each other.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from split_common.engine.pool import PagePool
from split_common.engine.sequences import KVSequence
from split_common.errors import Evicted
from split_device.generation.active import ActiveRequest
from split_device.generation.local_layers import LocalLayers
from split_device.generation.prefix_cache import PrefixCache
from split_device.generation.stage import Stage
from split_device.sessions.prefix import SessionPrefix

#: Fewest tokens that a request begins with: fewer are not worth a copy.
MIN_TOKENS = 16

Sequences = tuple[KVSequence | None, KVSequence | None]


@dataclass(eq=False)
class Kept:
    """What an ended request leaves behind: its session, which its worker keeps, and its keys and values here."""

    session: SessionPrefix
    sequences: Sequences

    def free(self) -> None:
        self.session.close()
        _free(self.sequences)


class Prefixes:
    """Gives requests their beginnings, and keeps those of requests that end. One thread uses it.

    Args:
        parts: the model's `split_parts`.
        layers: head and tail.
        stages: where they run.
        memory: most bytes to keep, of keys, values and the states that the body gets; 0 for no beginnings at all.
    """

    def __init__(self, parts: Any, layers: LocalLayers, stages: tuple[Stage, Stage], memory: int) -> None:
        stores = [stage.runner.store for stage in stages if stage.runner is not None]
        self._layers = layers
        self._enabled = memory > 0
        self._stages = stages
        # A state cannot be cut back.
        self._whole = layers.has_states
        self._kept: PrefixCache[Kept] = PrefixCache(
            memory,
            sum(store.token_bytes for store in stores) + layers.state_bytes,
            entry_tokens=max((store.sequence_tokens for store in stores), default=0),
            shared=all(isinstance(store, PagePool) for store in stores),
            whole=self._whole,
        )
        #: The first tokens of requests that run, int64; the oldest request first.
        self._running: dict[ActiveRequest, np.ndarray] = {}
        #: Requests that wait, by the one that computes their beginning.
        self._waiting: dict[ActiveRequest, list[ActiveRequest]] = {}
        #: What requests began with, until their first step is back.
        self._origins: dict[ActiveRequest, Kept] = {}
        for stage in stages:
            stage.reclaim = self._kept.evict

    @property
    def kept_bytes(self) -> int:
        """Bytes that ended requests hold."""
        return self._kept.held_bytes

    def find(self, request: ActiveRequest) -> bool:
        """Gives a new request its beginning. Returns whether it may enter the head; if not, it waits."""
        if not self._takes_part(request):
            return True
        wanted = request.pending[0][:-1]
        tokens = np.array(wanted, dtype=np.int64)
        computed, computed_tokens = self._computed_by(request, tokens)
        kept, kept_tokens = self._kept.find(_scope(request), wanted) or (None, 0)
        best = max(computed_tokens, kept_tokens)
        if self._waits(request, tokens, best):
            return False
        if computed is not None and computed.prefix is not None and best == computed_tokens >= MIN_TOKENS:
            self._begin_with(request, computed.prefix, computed.sequences, best)
        elif kept is not None and best >= MIN_TOKENS:
            if kept.session.is_live and self._begin_with(request, kept.session, kept.sequences, best):
                self._origins[request] = kept
            else:
                self._kept.drop(kept)
                return self.find(request)
        self._running[request] = np.array([*wanted, request.pending[0][-1]], dtype=np.int64)
        return True

    def can_cut_back(self, request: ActiveRequest) -> bool:
        """Whether the first tokens of what a request holds can be kept without the last ones."""
        return self._takes_part(request) and not self._whole

    def _takes_part(self, request: ActiveRequest) -> bool:
        asked = request.generation.request
        if not self._enabled or self._layers.indivisible:
            return False
        # Tokens do not tell which images they stand for; and scores need states of the whole prompt.
        return not asked.images and asked.prompt_logprobs is None

    def _computed_by(self, request: ActiveRequest, tokens: np.ndarray) -> tuple[ActiveRequest | None, int]:
        """The request that runs and has computed most of these tokens from the first on, and their number."""
        best: tuple[ActiveRequest | None, int] = None, 0
        for other, its in self._running.items():
            if other.prefix is not None and other.prefix.is_live and _scope(other) == _scope(request):
                count = min(_shared(its, tokens), other.prefix.tokens)
                best = (other, count) if count > best[1] else best
        return best

    def _waits(self, request: ActiveRequest, tokens: np.ndarray, available: int) -> bool:
        """Makes a request wait if another one is computing more of these tokens than are available."""
        if self._whole:
            return False
        for other, its in self._running.items():
            if (
                not other.awaits_first_token
                or other.priority < request.priority
                or _scope(other) != _scope(request)
            ):
                continue
            shared = _shared(its, tokens)
            computed = other.prefix.tokens if other.prefix is not None else 0
            if shared <= computed or shared < available + MIN_TOKENS or not _is_near(other, shared, available):
                continue
            self._waiting.setdefault(other, []).append(request)
            request.prompt_tokens = len(tokens) + 1 - shared
            return True
        return False

    def _begin_with(self, request: ActiveRequest, prefix: SessionPrefix, sequences: Sequences, tokens: int) -> bool:
        """Makes a new request begin with copies. Returns whether the sequences can be cut back so far."""
        copies = [sequence.fork() if sequence is not None else None for sequence in sequences]
        try:
            for copy in copies:
                if copy is not None:
                    copy.truncate(tokens)
        except Evicted:
            _free(copies)
            return False
        head, tail = copies
        request.sequences = head, tail
        request.session.begin_with(prefix, tokens)
        request.head_tokens = request.tail_tokens = request.copied_tokens = tokens
        request.pending[0] = request.pending[0][tokens:]
        request.prompt_tokens = len(request.pending[0])
        return True

    def returned(self, request: ActiveRequest) -> None:
        """A request's first step is back: it is known whether its worker had the beginning."""
        origin = self._origins.pop(request, None)
        if not request.session.copied:
            request.copied_tokens = 0
            if origin is not None:
                self._kept.drop(origin)
        prompt = len(request.generation.request.prompt)
        request.generation.cached_tokens = min(request.copied_tokens, prompt)

    def computed(self, request: ActiveRequest) -> list[ActiveRequest]:
        """A request's prompt is through, or a part of it. Returns the requests that have waited and may enter."""
        if request in self._running and not self._whole:
            request.prefix = request.session.prefix()
            if request.prefix is None:
                # Nobody can begin with it, so nobody is to wait for it.
                del self._running[request]
        return self._release(request)

    def ended(self, request: ActiveRequest, keep: bool) -> tuple[bool, list[ActiveRequest]]:
        """A request has ended.

        Args:
            keep: whether to keep what it holds, if that is possible.

        Returns:
            Whether it is kept: if not, the caller frees it. And the requests that have waited and may enter.
        """
        self._running.pop(request, None)
        self._origins.pop(request, None)
        for waiting in self._waiting.values():
            if request in waiting:
                waiting.remove(request)
        return keep and self.keep(request), self._release(request)

    def _release(self, request: ActiveRequest) -> list[ActiveRequest]:
        return [each for each in self._waiting.pop(request, ()) if not each.ended and self.find(each)]

    def keep(self, request: ActiveRequest) -> bool:
        """Keeps what an ended request holds, if that is possible; if not, the caller frees it.

        It may have ended between two parts of a step: what head, tail and worker all have is kept.
        """
        lengths = [sequence.length for sequence in request.sequences if sequence is not None]
        lengths += [request.tail_tokens, request.session.settled]
        # Drafts are not among the tokens.
        tokens = min(len(request.tokens), *lengths)
        if not self._takes_part(request) or tokens < MIN_TOKENS or (self._whole and tokens < max(lengths)):
            return False
        try:
            for sequence in request.sequences:
                if sequence is not None:
                    sequence.truncate(tokens)
        except Evicted:
            return False
        request.session.crop(tokens)
        session = request.session.detach()
        if session is None:
            return False
        self._kept.put(_scope(request), request.tokens[:tokens], Kept(session, request.sequences))
        return True

    def make_room(self, requests: Collection[ActiveRequest]) -> None:
        """Frees what is kept where requests that run may need the memory."""
        for end, stage in enumerate(self._stages):
            while stage.free < sum(_growth(request, end) for request in requests) and self._kept.evict():
                pass

    def clear(self) -> None:
        """Frees all that is kept."""
        self._kept.clear()


def _scope(request: ActiveRequest) -> Hashable:
    """What keys and values depend on beside the tokens."""
    return request.session.adapter


def _shared(one: np.ndarray, two: np.ndarray) -> int:
    """How many tokens two sequences share, from the first on."""
    length = min(len(one), len(two))
    different = one[:length] != two[:length]
    return int(different.argmax()) if different.any() else length


def _is_near(request: ActiveRequest, shared: int, available: int) -> bool:
    """Whether a request soon computes enough of its first `shared` tokens, of which some are available already.

    What has not entered the head is divided there if the rest is longer.
    """
    under_way = request.head_tokens
    if min(shared, under_way) >= available + MIN_TOKENS:
        return under_way <= 2 * shared
    first = request.pending[0] if request.pending else []
    ahead = shared - under_way
    if ahead < MIN_TOKENS or not first:
        return False
    if len(first) > 2 * ahead:
        request.pending[0] = first[:ahead]
        request.pending.insert(1, first[ahead:])
    return True


def _growth(request: ActiveRequest, end: int) -> int:
    """Memory that a request may still take in head or tail; a page more if others share its last one."""
    sequence = request.sequences[end]
    if sequence is None:
        return 0
    return sequence.cost(max(1, request.sampler.max_length - sequence.length)) + 1


def _free(sequences: Iterable[KVSequence | None]) -> None:
    for sequence in sequences:
        if sequence is not None:
            sequence.free()
