"""One forward for each sequence, with a cache of transformers: always right, but slower than packed forwards."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from split_common.engine.additions import adding
from split_common.engine.forward import Forward
from split_common.engine.layers import LayerRange
from split_common.engine.lora import adapting
from split_common.engine.sequences import Place, TokenRun, positions_of
from split_common.engine.trees import in_place
from split_common.errors import Evicted, UnsupportedFeature
from split_common.models.cache_layers import (
    States,
    TokenCounter,
    copy_layer,
    copy_states,
    cut_keys,
    has_states,
    key_bytes,
    make_cache,
    restore_states,
    state_bytes,
)
from split_common.models.split import Split

#: Capacity of a store in tokens, until it is known how many bytes a token takes.
UNMEASURED = 2**31

#: How many tokens a sequence with states can be taken back at least: a step of speculative decoding. It is also how
#: many tokens are run again at most, and how seldom states are copied.
REPLAYED_TOKENS = 32


@dataclass(frozen=True)
class Inputs:
    """Inputs of the layers, `[tokens, width]`, and the rotary positions."""

    states: torch.Tensor
    positions: tuple[Place, ...]

    def first(self, tokens: int) -> Inputs:
        return Inputs(self.states[:tokens], self.positions[:tokens])

    def followed_by(self, states: torch.Tensor, positions: Sequence[Place]) -> Inputs:
        return Inputs(torch.cat([self.states, states.to(self.states.dtype)]), (*self.positions, *positions))


@dataclass
class Snapshot:
    """States after the first `tokens` tokens, by the layer's index, and the inputs that came next.

    The inputs are those of `REPLAYED_TOKENS` tokens at most.
    """

    tokens: int
    states: dict[int, States]
    inputs: Inputs

    def reaches(self, tokens: int) -> bool:
        """Whether a sequence can be taken back to this length."""
        return self.tokens <= tokens <= self.tokens + len(self.inputs.positions)


class CachedSequence:
    """A sequence with a `DynamicCache` of its own, whose layers outside the range stay empty.

    States of a layer cannot be truncated. So a sequence keeps a snapshot of them, and the inputs that came since:
    when it is truncated, it returns to the snapshot, and the next forward runs the inputs again that are kept.
    """

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self.length = 0
        #: How many tokens the cache has seen: all, or those of the snapshot.
        self._seen = 0
        self._snapshot: Snapshot | None = None

    @functools.cached_property
    def cache(self) -> DynamicCache:
        """Made when it is needed, because rows may stay empty."""
        return self._store.new_cache()

    @property
    def key_bytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(map(key_bytes, self._layers))

    @property
    def state_bytes(self) -> int:
        """Bytes of its states, without the snapshot."""
        return sum(map(state_bytes, self._layers))

    def cost(self, tokens: int) -> int:
        return self._store.tokens_of(self.length + tokens) - self._store.tokens_of(self.length)

    @property
    def _layers(self) -> list[Any]:
        return list({id(layer): layer for layer in self.cache.layers}.values())

    def extended(self, tokens: int) -> None:
        """Notes that a forward has appended tokens to the cache."""
        self._resize(self.length + tokens)
        self._seen = self.length
        self._count()

    def begin(self, states: torch.Tensor, positions: Sequence[Place]) -> tuple[torch.Tensor, Sequence[Place]]:
        """The inputs of a forward that appends tokens: theirs, after those that have to run again.

        Args:
            states: `[tokens, width]`.
            positions: of these tokens.
        """
        if not self._store.has_states:
            return states, positions
        pending = self._pending
        snapshot = self._snapshot
        if pending is None and (
            snapshot is None or len(snapshot.inputs.positions) + len(positions) > REPLAYED_TOKENS
        ):
            copies = {index: copy_states(self.cache.layers[index]) for index in self._store.layers_with_states}
            snapshot = self._snapshot = Snapshot(self.length, copies, Inputs(states[:0].clone(), ()))
        assert snapshot is not None
        more = REPLAYED_TOKENS - len(snapshot.inputs.positions)
        if more > 0:
            snapshot.inputs = snapshot.inputs.followed_by(states[:more], positions[:more])
        if pending is None:
            return states, positions
        again = pending.followed_by(states, positions)
        return again.states, again.positions

    @property
    def _pending(self) -> Inputs | None:
        """The inputs that the cache has yet to see again."""
        return self._snapshot.inputs if self._snapshot is not None and self._seen < self.length else None

    def take_back(self) -> None:
        """Reverts a forward that has failed, which may have changed some of the layers."""
        self._rewind(self.length)

    def truncate(self, tokens: int) -> None:
        """Cuts the sequence back to its first `tokens` tokens.

        Raises:
            Evicted: it has states, and the inputs since `tokens` tokens are not kept; nothing was changed.
        """
        if tokens == self.length:
            return
        if not tokens:
            self.free()
            return
        if self._store.has_states and (self._snapshot is None or not self._snapshot.reaches(tokens)):
            raise Evicted(f"the layers' states cannot be taken back from {self.length} to {tokens} tokens")
        self._rewind(tokens)
        self._resize(tokens)

    def keep(self, begin: int, kept: Sequence[int]) -> None:
        if in_place(kept) < len(kept):
            raise UnsupportedFeature(
                "from layers that run one sequence at a time, only the last tokens can be dropped"
            )
        self.truncate(begin + len(kept))

    def cost_after(self, begin: int, kept: Sequence[int], tokens: int) -> int:
        return self._store.tokens_of(begin + len(kept) + tokens) - self._store.tokens_of(self.length)

    def _rewind(self, tokens: int) -> None:
        """Makes the cache one of `tokens` tokens, or of fewer, the next ones of which are pending."""
        self._seen = tokens
        if (snapshot := self._snapshot) is not None:
            self._seen = snapshot.tokens
            snapshot.inputs = snapshot.inputs.first(tokens - snapshot.tokens)
            for index, states in snapshot.states.items():
                restore_states(self.cache.layers[index], states)
        for layer in self._layers:
            cut_keys(layer, self._seen)
        self._count()

    def fork(self) -> CachedSequence:
        twin = CachedSequence(self._store)
        if not self.length:
            return twin
        # Keys and values are shared: a cache that grows makes new ones.
        twin.cache = copy.copy(self.cache)
        copies = {id(layer): copy_layer(layer) for layer in self.cache.layers}
        twin.cache.layers = [copies[id(layer)] for layer in self.cache.layers]
        twin._resize(self.length)
        twin._seen = self._seen
        # States of a snapshot do not change; its inputs are replaced when they do.
        twin._snapshot = copy.copy(self._snapshot)
        return twin

    def free(self) -> None:
        self._resize(0)
        self._seen = 0
        self._snapshot = None
        self.__dict__.pop("cache", None)

    def _resize(self, length: int) -> None:
        self._store.used += self._store.tokens_of(length) - self._store.tokens_of(self.length)
        self.length = length

    def _count(self) -> None:
        for layer in self._layers:
            if isinstance(layer, TokenCounter):
                layer.tokens = self._seen


class CacheStore:
    """Makes sequences for the layers of a split's body.

    Args:
        config: the model's text configuration.
        split: which layers have keys and values.
        capacity: most tokens to hold, over all sequences.
    """

    def __init__(self, config: Any, split: Split, capacity: int = UNMEASURED) -> None:
        self._config = config
        self._split = split
        self.capacity = capacity
        #: Tokens that all sequences hold, and bytes of one.
        self.used = 0
        self.token_bytes = 1
        self.sequence_tokens = 0
        #: The layers that have states.
        self.layers_with_states = [
            index
            for index, layer in enumerate(self.new_cache().layers)
            if index in split.body and has_states(layer)
        ]

    @property
    def has_states(self) -> bool:
        """Whether some layer has states."""
        return bool(self.layers_with_states)

    @property
    def free(self) -> int:
        return self.capacity - self.used

    free_tokens = free

    def held_by(self, sequences: Sequence[CachedSequence]) -> int:
        """Tokens of memory that these sequences of it hold, and that would be free besides without them."""
        return sum(self.tokens_of(sequence.length) for sequence in sequences)

    freed_by = held_by

    def tokens_of(self, length: int) -> int:
        """Tokens of memory that a sequence of `length` tokens takes."""
        return length + self.sequence_tokens if length else 0

    def measured(self, memory: int, token_bytes: int, state_bytes: int) -> None:
        """Sets the capacity, before there are sequences.

        Args:
            memory: bytes for all sequences.
            token_bytes: of a token's keys and values; 0 if no layer has any.
            state_bytes: of a sequence's states, which it keeps twice.
        """
        self.token_bytes = unit = token_bytes or 1
        self.capacity = memory // unit
        self.sequence_tokens = -(-2 * state_bytes // unit)

    def new_sequence(self) -> CachedSequence:
        return CachedSequence(self)

    def new_cache(self) -> DynamicCache:
        """An empty cache, with a cache layer of the right kind at each index of the body."""
        return make_cache(self._config, self._split)


class PerSequenceExecutor:
    """Runs each sequence of a batch in a forward of its own, by the layers' own attention (an `Executor`)."""

    attention = None
    takes_trees = False
    fusion = None

    def __init__(self, layers: LayerRange, store: CacheStore) -> None:
        self._layers = layers
        self.store = store

    @torch.inference_mode()
    def launch(self, runs: Sequence[TokenRun[CachedSequence]]) -> Forward:
        """Appends the runs' tokens to their sequences."""
        return Forward(torch.cat([self._run(run) for run in runs]), [run.cost for run in runs])

    def _run(self, run: TokenRun[CachedSequence]) -> torch.Tensor:
        layers, sequence = self._layers, run.sequence
        states, positions = sequence.begin(run.states, run.places)
        try:
            with adapting([run.adapter], [len(states)]), adding(layers, [run]):
                output = layers.forward(
                    layers.to_device(states),
                    layers.to_device(positions_of(positions)),
                    **{layers.stack.cache_name: sequence.cache, "use_cache": True},
                )
        except torch.AcceleratorError:
            raise
        except Exception:
            sequence.take_back()
            raise
        sequence.extended(run.cost)
        return output[-run.cost :]
