"""Finds out whether left padding changes what layers compute for a row.

Padding does not travel, so a worker computes each row as if it were alone. So do most models, whose masks hide
padding. Some count its columns, or use the mask for more than hiding keys: the worker's row is then not the
unsplit model's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from split_common.engine.layers import LayerRange
from split_common.engine.per_sequence import CacheStore
from split_common.models.cache_layers import counts_tokens

log = logging.getLogger(__name__)

#: Columns of padding in the probe.
PADDING = 5

#: Tokens of the row, if no layer has a length of its own that the row has to exceed.
TOKENS = 9

#: Longest such length that is probed, in tokens.
MAX_LENGTH = 4096

#: Numbers of columns before a row that is not there. Layers that scale by an index may do it in steps of thousands.
OFFSETS = (1 << 14, 1 << 15)

#: Accepted differences, relative to the norm of the output. Experts may be chosen otherwise if numbers are rounded.
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.25

#: Accepted difference between two numbers of columns that are not there, which need not round otherwise.
OFFSET_TOLERANCE = 1e-6


@torch.inference_mode()
def padding_matters(layers: LayerRange, store: CacheStore, tokens: int) -> bool:
    """Whether a row's output depends on padding to its left, by the layers' own attention.

    Args:
        layers: the layers, before their attention is replaced.
        store: makes their caches.
        tokens: the length of the row, see `probe_tokens`.
    """
    states = torch.randn(PADDING + tokens, layers.width, generator=torch.Generator().manual_seed(0))
    alone = _run(layers, store.new_cache(), states[PADDING:])
    try:
        padded = _run(layers, store.new_cache(), states, padding=PADDING)
    except Exception as error:
        log.info("layers do not take padding: %s", error)
        return True
    if _differs(padded, alone, TOLERANCE.get(layers.dtype, HALF_TOLERANCE)):
        return True
    try:
        near, far = (_run(layers, _shifted(store.new_cache(), offset), states[:TOKENS]) for offset in OFFSETS)
    except Exception as error:
        # They count columns in a manner of their own, such as for linear biases. The padded row was right.
        log.info("layers do not take a cache whose first columns are missing: %s", error)
        return False
    return _differs(far, near, OFFSET_TOLERANCE)


def _run(layers: LayerRange, cache: Any, states: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """The output of a row, float32 `[tokens, width]`, after so many columns of padding."""
    tokens = len(states) - padding
    positions = torch.tensor([[0] * padding + list(range(tokens))])
    arguments: dict[str, Any] = {layers.stack.cache_name: cache, "use_cache": True}
    if padding:
        mask = torch.ones(1, len(states), dtype=torch.long)
        mask[:, :padding] = 0
        arguments["attention_mask"] = layers.to_device(mask)
    output = layers.forward(layers.to_device(states), layers.to_device(positions), **arguments)
    return output[padding:].float()


def _differs(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    finite = torch.isfinite(one).all() and torch.isfinite(other).all()
    return bool(finite) and bool((one - other).norm() > tolerance * other.norm())


def probe_tokens(layers: LayerRange, store: CacheStore) -> int:
    """The length of a probe's row: longer than what some layers have beside the windows of their caches."""
    windows = {getattr(layer, "sliding_window", None) for layer in store.new_cache().layers}
    lengths = [
        value
        for layer in layers.modules
        for module in layer.modules()
        for name, value in vars(module).items()
        if "window" in name and type(value) is int and TOKENS < value <= MAX_LENGTH and value not in windows
    ]
    return max(lengths, default=0) + TOKENS


def _shifted(cache: Any, offset: int) -> Any:
    """A cache that reports `offset` columns before those that it holds, as a window does that has dropped them."""
    for layer in {id(layer): layer for layer in cache.layers if counts_tokens(layer)}.values():
        _shift(layer, offset)
    return cache


def _shift(layer: Any, offset: int) -> None:
    length, sizes = layer.get_seq_length, layer.get_mask_sizes

    def get_seq_length() -> int:
        return int(length()) + offset

    def get_mask_sizes(query_length: int) -> tuple[int, int]:
        # It may ask for the length itself.
        layer.get_seq_length = length
        columns, hidden = sizes(query_length)
        layer.get_seq_length = get_seq_length
        return columns, hidden + offset

    layer.get_seq_length, layer.get_mask_sizes = get_seq_length, get_mask_sizes
