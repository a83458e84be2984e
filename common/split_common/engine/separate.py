"""Rows as caches of transformers' own: one forward for each. Always right; the packed path is only faster."""

from __future__ import annotations

import copy
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer

from split_common.engine.rows import Row
from split_common.split import Split


class CacheRow:
    """A row with a `DynamicCache` of its own; layers outside the range have none."""

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
            if isinstance(layer, DummyLayer) or layer.keys is None:
                continue
            layer.keys = layer.keys[..., :tokens, :]
            layer.values = layer.values[..., :tokens, :]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = tokens
        self._store.used -= self.length - tokens
        self.length = tokens

    def fork(self) -> CacheRow:
        # Tensors may be shared: caches grow by making new ones.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
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
        cache.layers = [
            layer if index in self._split.body else DummyLayer() for index, layer in enumerate(cache.layers)
        ]
        # Sliding layers forget what left their window, unless told that a rollback may come.
        for layer in cache.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        return cache
