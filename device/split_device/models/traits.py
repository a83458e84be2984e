"""Properties of a model's layers that decide how its steps travel, and how a configuration tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache

from split_common.models.cache_layers import counts_tokens, has_states


@dataclass(frozen=True)
class Traits:
    """Properties of the body's layers, which the device does not have."""

    #: Whether padding between tokens would change the output: a layer may count the cache's indices instead of the
    #: tokens' positions, as those with sliding windows or without position ids do, or have a state, which decays.
    counts_indices: bool
    #: Whether the inputs of a token depend on the largest position of the call.
    positions_interact: bool
    #: Whether a layer of the whole model attends to earlier tokens. Those with states alone need no mask of them.
    attends: bool = True
    #: How many axes positions have in a model that sees images; None for a model for texts.
    axes: int | None = None


def attends(config: Any) -> bool:
    """Whether any layer of the whole model attends to earlier tokens."""
    layers = DynamicCache(config=config).layers
    return not layers or any(map(counts_tokens, layers))


def has_states_outside(config: Any, body: range) -> bool:
    """Whether any layer outside the body keeps states, in head or tail."""
    return any(has_states(layer) for i, layer in enumerate(DynamicCache(config=config).layers) if i not in body)


def keeps_states(config: Any) -> bool:
    """Whether any layer of the whole model keeps states."""
    return has_states_outside(config, range(0))


def sees_gaps(config: Any, body: range) -> bool:
    """Whether any of the body's layers has a sliding window, or a state."""
    layers = DynamicCache(config=config).layers
    seeing = [bool(getattr(layer, "is_sliding", False)) or has_states(layer) for layer in layers]
    if any(seeing):
        return any(seeing[body.start : body.stop])
    # Older architectures mask a window in their layers, and their caches have no trace of it.
    names = ("window", "window_size")
    return any(isinstance(size, int) and size > 1 for name, size in vars(config).items() if name.endswith(names))
