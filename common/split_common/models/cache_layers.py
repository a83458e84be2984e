"""What a layer keeps of a sequence, by the kinds of transformers' cache layers: keys and values, states, or both.

Keys and values are there for each token, as are the keys by which an indexer chooses among them. A *state*, of a
recurrence or a convolution, is there once, and each token changes it in place.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from split_common.errors import UnsupportedArchitecture
from split_common.models.split import Split

#: Kinds of cache layers that a sequence may have.
_KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    DynamicIndexedLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
)

#: Attributes in which a cache layer has its states and what it knows of them, each a dict by the state's number.
_STATES = (
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)

#: A copy of these attributes, by their names.
States = dict[str, dict[int, Any]]


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer that keeps keys and values outside the window, so that it can be truncated."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visible = self.sliding_window - 1 + key_states.shape[-2]
        keys, values = DynamicLayer.update(self, key_states, value_states, *args, **kwargs)
        self.cumulative_length = keys.shape[-2]
        return keys[..., -visible:, :], values[..., -visible:, :]


class WindowAndStateLayer(LinearAttentionAndSlidingWindowAttentionLayer):  # type: ignore[misc]
    """The same for a layer that has states as well."""

    update = WindowLayer.update


class TokenCounter(DynamicLayer):  # type: ignore[misc]
    """Stands for attention layers that run elsewhere: knows how many tokens there are, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.tokens = 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0


def check_cache(config: Any, name: str) -> None:
    """Raises UnsupportedArchitecture if a layer keeps something that a sequence cannot hold.

    Args:
        config: the model's configuration.
        name: the model's, for the message.
    """
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in _KNOWN:
            raise UnsupportedArchitecture(
                f"{name}: the cache of layer {index} is a {type(layer).__name__}, which holds more "
                "than keys, values and states of its own"
            )


def make_cache(config: Any, split: Split) -> DynamicCache:
    """An empty cache for the layers `[split.first, split.last)` of a model with this text configuration."""
    cache = DynamicCache(config=config)
    cache.layers += [DynamicLayer() for _ in range(split.layers - len(cache.layers))]
    body = [_untruncated(layer) for layer in cache.layers[split.first : split.last]]
    alike = {_kind(layer): layer for layer in reversed(body)}
    counter = TokenCounter()
    # transformers takes a mask's size, and whether there are states, from layers that may run elsewhere.
    cache.layers = [alike.get(_kind(layer), counter if counts_tokens(layer) else layer) for layer in cache.layers]
    cache.layers[split.first : split.last] = body
    if not any(map(counts_tokens, cache.layers)):
        cache.layers.append(counter)
    return cache


def _untruncated(layer: Any) -> Any:
    """The same kind of layer, which can be truncated to any length."""
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowLayer(layer.sliding_window)
    if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
        return WindowAndStateLayer(layer.sliding_window, layer.number_of_states)
    return layer


def _kind(layer: Any) -> tuple[bool, bool, bool]:
    """Whether it counts tokens, has a sliding window, has states alone."""
    counts = counts_tokens(layer)
    return counts, bool(getattr(layer, "is_sliding", False)), has_states(layer) and not counts


def counts_tokens(layer: Any) -> bool:
    """Whether a layer knows how many tokens it has seen, as those with keys and values do."""
    return isinstance(layer, CacheLayerMixin)


def has_states(layer: Any) -> bool:
    """Whether a layer keeps states of a recurrence or a convolution."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def chooses_keys(layer: Any) -> bool:
    """Whether a layer attends to the keys that an indexer chooses, by keys of its own."""
    return isinstance(layer, DynamicIndexedLayer)


def unpackable(cache: Any, split: Split) -> str | None:
    """What a layer of the body keeps that no packed forward reads; None if trials show whether one does."""
    for index in split.body:
        if has_states(cache.layers[index]):
            return f"layer {index} keeps a recurrent or convolutional state"
    for index in split.body:
        # Rehearsals are shorter than the number of keys that are chosen.
        if chooses_keys(cache.layers[index]):
            return f"layer {index} attends to the keys that an indexer chooses"
    return None


def copy_states(layer: Any) -> States:
    """A copy of a layer's states, which change in place."""
    return {name: _copied(getattr(layer, name)) for name in _STATES}


def restore_states(layer: Any, states: States) -> None:
    """Gives a layer a copy of these states."""
    for name, value in states.items():
        setattr(layer, name, _copied(value))


def copy_layer(layer: Any) -> Any:
    """A copy of a layer, which grows independently. It shares keys and values, which are replaced when it grows."""
    copied = copy.copy(layer)
    if has_states(layer):
        restore_states(copied, {name: getattr(layer, name) for name in _STATES})
    return copied


def _copied(value: dict[int, Any]) -> dict[int, Any]:
    return {key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in value.items()}


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds; 0 if all its layers have states alone, which do not tell."""
    return next((int(layer.get_seq_length()) for layer in cache.layers if counts_tokens(layer)), 0)


def was_used(cache: Any) -> bool:
    """Whether a cache has been through a forward."""
    states = (layer for layer in cache.layers if has_states(layer))
    return cached_tokens(cache) > 0 or any(any(layer.has_previous_state.values()) for layer in states)


def cut_keys(layer: Any, tokens: int) -> None:
    """Cuts a layer's keys and values, if it has any, back to the first `tokens` tokens."""
    if isinstance(layer, TokenCounter):
        layer.tokens = tokens
    elif isinstance(getattr(layer, "keys", None), torch.Tensor):
        layer.keys = layer.keys[..., :tokens, :]
        layer.values = layer.values[..., :tokens, :]
        if layer.is_sliding:
            layer.cumulative_length = tokens
    if chooses_keys(layer) and layer.indexer_keys is not None:
        layer.indexer_keys = layer.indexer_keys[:, :tokens]
        if layer.indexer_position_ids is not None:
            layer.indexer_position_ids = layer.indexer_position_ids[..., :tokens]


def crop_keys(layer: Any, tokens: int) -> None:
    """Removes the last `tokens` tokens from a layer's keys and values, if it has any.

    Raises:
        RuntimeError: it has a sliding window and has dropped tokens.
    """
    if chooses_keys(layer):
        layer.crop(-tokens)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        DynamicSlidingWindowLayer.crop(layer, -tokens)
    elif isinstance(layer, DynamicLayer):
        DynamicLayer.crop(layer, -tokens)


def key_bytes(layer: Any) -> int:
    """Bytes of a layer's keys and values, and of the keys of its indexer."""
    names = ("keys", "values", "indexer_keys", "indexer_position_ids")
    tensors = (getattr(layer, name, None) for name in names)
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def state_bytes(layer: Any) -> int:
    """Bytes of a layer's states."""
    if not has_states(layer):
        return 0
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return sum(state.nbytes for state in states if state is not None)
