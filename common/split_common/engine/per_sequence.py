"""One forward for each sequence, with a cache of transformers: always right, but slower than packed forwards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from split_common.engine.forward import Forward
from split_common.engine.layers import LayerRange
from split_common.engine.sequences import TokenRun
from split_common.models.split import Split

#: Capacity of a store in tokens, until it is known how many bytes a token takes.
UNMEASURED = 2**31


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer that keeps keys and values outside the window, so that it can be truncated."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visible = self.sliding_window - 1 + key_states.shape[-2]
        keys, values = DynamicLayer.update(self, key_states, value_states, *args, **kwargs)
        self.cumulative_length = keys.shape[-2]
        return keys[..., -visible:, :], values[..., -visible:, :]


class CachedSequence:
    """A sequence with a `DynamicCache` of its own, whose layers outside the range stay empty."""

    def __init__(self, store: CacheStore, cache: DynamicCache) -> None:
        self._store = store
        self.cache = cache
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        layers = {id(layer): layer for layer in self.cache.layers}.values()
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @property
    def held_tokens(self) -> float:
        return self.length

    def cost(self, tokens: int) -> int:
        return tokens

    def extended(self, tokens: int) -> None:
        """Notes that a forward has appended tokens to the cache."""
        self.length += tokens
        self._store.used += tokens

    def truncate(self, tokens: int) -> None:
        if tokens == self.length:
            return
        for layer in self.cache.layers:
            layer.keys = layer.keys[..., :tokens, :]
            layer.values = layer.values[..., :tokens, :]
            if layer.is_sliding:
                layer.cumulative_length = tokens
        self._store.used -= self.length - tokens
        self.length = tokens

    def fork(self) -> CachedSequence:
        # The tensors are shared: a cache that grows makes new ones.
        cache = copy.copy(self.cache)
        copies = {id(layer): copy.copy(layer) for layer in self.cache.layers}
        cache.layers = [copies[id(layer)] for layer in self.cache.layers]
        twin = CachedSequence(self._store, cache)
        twin.extended(self.length)
        return twin

    def free(self) -> None:
        self._store.used -= self.length
        self.length = 0
        self.cache = self._store.new_cache()


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
        #: Tokens that all sequences hold.
        self.used = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    free_tokens = free

    def new_sequence(self) -> CachedSequence:
        return CachedSequence(self, self.new_cache())

    def new_cache(self) -> DynamicCache:
        """An empty cache, with a cache layer of the right kind at each index of the body."""
        cache = DynamicCache(config=self._config)
        cache.layers += [DynamicLayer() for _ in range(self._split.layers - len(cache.layers))]
        body = [
            WindowLayer(layer.sliding_window) if layer.is_sliding else DynamicLayer()
            for layer in cache.layers[self._split.first : self._split.last]
        ]
        alike = {layer.is_sliding: layer for layer in reversed(body)}
        # transformers takes a mask's size from the first layer of a kind, even if that layer runs elsewhere.
        cache.layers = [alike.get(layer.is_sliding, body[0]) for layer in cache.layers]
        cache.layers[self._split.first : self._split.last] = body
        return cache


class PerSequenceExecutor:
    """Runs each sequence of a batch in a forward of its own, by the layers' own attention (an `Executor`)."""

    attention = None

    def __init__(self, layers: LayerRange, store: CacheStore) -> None:
        self._layers = layers
        self.store = store

    @torch.inference_mode()
    def launch(self, runs: Sequence[TokenRun[CachedSequence]]) -> Forward:
        """Appends the runs' tokens to their sequences."""
        return Forward(torch.cat([self._run(run) for run in runs]), [run.cost for run in runs])

    def _run(self, run: TokenRun[CachedSequence]) -> torch.Tensor:
        layers, cache = self._layers, run.sequence.cache
        states = layers.to_device(run.states)
        positions = layers.to_device(torch.tensor([list(run.positions)]))
        output = layers.forward(states, positions, **{layers.stack.cache_name: cache, "use_cache": True})
        run.sequence.extended(run.cost)
        return output
