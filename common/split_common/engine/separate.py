"""Rows as caches of transformers' own: one forward for each. Always right; the packed path is only faster."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from split_common.engine.rows import Row
from split_common.split import Split


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The keys and values of a sliding-window layer, all of them: a row may be cut back at any time."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visible = self.sliding_window - 1 + key_states.shape[-2]
        keys, values = DynamicLayer.update(self, key_states, value_states, *args, **kwargs)
        self.cumulative_length = keys.shape[-2]
        return keys[..., -visible:, :], values[..., -visible:, :]


class CacheRow:
    """A row with a `DynamicCache` of its own, whose layers outside the range stay empty."""

    def __init__(self, store: SeparateStore, cache: DynamicCache) -> None:
        self._store = store
        self.cache = cache
        self.length = 0

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

    def fork(self) -> CacheRow:
        # Tensors may be shared: caches grow by making new ones.
        cache = copy.copy(self.cache)
        copies = {id(layer): copy.copy(layer) for layer in self.cache.layers}
        cache.layers = [copies[id(layer)] for layer in self.cache.layers]
        twin = CacheRow(self._store, cache)
        twin.extended(self.length)
        return twin

    def free(self) -> None:
        self._store.used -= self.length
        self.length = 0
        self.cache = self._store.new_cache()


class SeparateStore:
    """Makes rows for the layers of a split's body.

    Args:
        config: the model's text configuration.
        split: which layers have keys and values.
        capacity: tokens to hold at most, over all rows.
    """

    def __init__(self, config: Any, split: Split, capacity: int) -> None:
        self._config = config
        self._split = split
        self.capacity = capacity
        self.used = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    free_tokens = free

    def cost(self, row: Row, tokens: int) -> int:
        return tokens

    def new_row(self) -> CacheRow:
        return CacheRow(self, self.new_cache())

    def new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self._config)
        cache.layers += [DynamicLayer() for _ in range(self._split.layers - len(cache.layers))]
        body = [
            WindowLayer(layer.sliding_window) if layer.is_sliding else DynamicLayer()
            for layer in cache.layers[self._split.first : self._split.last]
        ]
        alike = {layer.is_sliding: layer for layer in reversed(body)}
        # transformers takes a mask's size from the first layer of a kind, be it one that runs elsewhere.
        cache.layers = [alike.get(layer.is_sliding, body[0]) for layer in cache.layers]
        cache.layers[self._split.first : self._split.last] = body
        return cache
