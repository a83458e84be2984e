"""Attention of packed sequences over their pages: what transformers' layers call in place of their own.

The function is registered with transformers' `AttentionInterface`; the batch in flight is found through a context
variable, because some layers drop the keyword arguments that they are handed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from split_common.engine.pool import PAGE_TOKENS, PagedSequence, PagePool

#: The name under which transformers knows this attention.
NAME = "lambda_split_packed"

#: Decoding sequences whose padded keys have at most this many tokens in all are attended to in one call.
BATCHED_TOKENS = 8192

#: Fewer sequences than this are attended to one by one.
BATCHED_SEQUENCES = 4


@dataclass(frozen=True)
class Call:
    """What a layer asks for, beside its tensors."""

    layer: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Span:
    """The tokens `[begin, begin + count)` of the packed batch: the last ones of a sequence."""

    sequence: PagedSequence
    begin: int
    count: int


@dataclass
class PackedBatch:
    """A batch in flight: whose tokens they are, and where their keys and values go."""

    pool: PagePool
    spans: Sequence[Span]
    #: Slots of the new tokens in the pool, int64 `[tokens]`.
    slots: torch.Tensor
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    gathers: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


current: ContextVar[PackedBatch] = ContextVar("packed batch")

#: Where the probe at load collects the calls, and the names of further arguments that layers hand over.
watching: ContextVar[list[tuple[Call, list[str]]] | None] = ContextVar("watched calls", default=None)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface over a packed batch.

    Args:
        query: `[1, heads, tokens, key_width]`; key, value: `[1, key_heads, tokens, width]` of the new tokens.
        sliding_window: tokens that each one attends to, itself included.
        softcap: attention logits are capped to ±softcap (Gemma 2 report, arXiv 2408.00118).
        s_aux: a learned logit of each head that takes attention away (attention sinks, arXiv 2309.17453).

    Returns:
        `[1, tokens, heads, value_width]`.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = Call(int(module.layer_idx), scale, sliding_window, softcap, s_aux)  # type: ignore[arg-type]
    watched = watching.get()
    if watched is not None:
        watched.append((call, [name for name, value in other.items() if value is not None]))
    batch = current.get()
    keys, values = batch.pool.storage(call.layer, key, value)
    keys.index_copy_(0, batch.slots, key[0].transpose(0, 1))
    values.index_copy_(0, batch.slots, value[0].transpose(0, 1))
    output = attend(call, query[0], batch, keys, values)
    return output.transpose(0, 1)[None], None


def attend(
    call: Call, query: torch.Tensor, batch: PackedBatch, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Attends each span `[heads, tokens, width]` to its own sequence; many short decoding ones at once."""
    plain = call.softcap is None and call.sinks is None
    together = _decoding(batch, call.window) if plain else []
    parts: list[torch.Tensor] = []
    if together:
        decoded = _attend_batched(call, query[:, : len(together)], batch, keys, values, together)
        parts.append(decoded)
    for span in batch.spans[len(together) :]:
        part = query[:, span.begin : span.begin + span.count]
        parts.append(_attend_one(call, part, span, batch, keys, values))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _decoding(batch: PackedBatch, window: int | None) -> Sequence[Span]:
    """The batch's leading spans of one token, if they are many and short."""
    count = 0
    longest = 0
    for span in batch.spans:
        if span.count != 1:
            break
        longest = max(longest, _visible(span.sequence.length, window))
        count += 1
    return batch.spans[:count] if count >= BATCHED_SEQUENCES and count * longest <= BATCHED_TOKENS else []


def _visible(length: int, window: int | None) -> int:
    return length if window is None else min(length, window)


def _attend_batched(
    call: Call,
    query: torch.Tensor,
    batch: PackedBatch,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: Sequence[Span],
) -> torch.Tensor:
    if call.window not in batch.gathers:
        batch.gathers[call.window] = _gather_plan(spans, call.window, query)
    slots, mask = batch.gathers[call.window]
    count, longest = len(spans), mask.shape[-1]
    heads, key_heads = query.shape[0], keys.shape[1]
    gathered_keys = keys.index_select(0, slots).view(count, longest, key_heads, -1).transpose(1, 2)
    gathered_values = values.index_select(0, slots).view(count, longest, key_heads, -1).transpose(1, 2)
    grouped = query.transpose(0, 1).reshape(count, key_heads, heads // key_heads, -1)
    output = scaled_dot_product_attention(grouped, gathered_keys, gathered_values, attn_mask=mask, scale=call.scale)
    return output.reshape(count, heads, -1).transpose(0, 1)


def _gather_plan(
    spans: Sequence[Span], window: int | None, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of all spans' visible tokens, padded on the left to one length, and the mask of the padding."""
    longest = max(_visible(span.sequence.length, window) for span in spans)
    slots = np.zeros((len(spans), longest), dtype=np.int64)
    mask = torch.full((len(spans), 1, 1, longest), float("-inf"), dtype=query.dtype)
    for index, span in enumerate(spans):
        visible = _visible(span.sequence.length, window)
        slots[index, longest - visible :] = span.sequence.slots(span.sequence.length - visible)
        # Padding repeats a token that is seen anyway: whatever lies in a free slot never enters the sum.
        slots[index, : longest - visible] = slots[index, longest - visible]
        mask[index, :, :, longest - visible :] = 0.0
    return torch.from_numpy(slots.reshape(-1)).to(query.device), mask.to(query.device)


def _attend_one(
    call: Call, query: torch.Tensor, span: Span, batch: PackedBatch, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    sequence = span.sequence
    visible = sequence.length if call.window is None else min(sequence.length, call.window + span.count - 1)
    first = sequence.length - visible
    if sequence.contiguous:
        origin = sequence.pages[0] * PAGE_TOKENS
        seen_keys, seen_values = (
            keys[origin + first : origin + sequence.length],
            values[origin + first : origin + sequence.length],
        )
    else:
        slots = torch.from_numpy(sequence.slots(first)).to(keys.device)
        seen_keys, seen_values = keys.index_select(0, slots), values.index_select(0, slots)
    seen_keys, seen_values = seen_keys.transpose(0, 1), seen_values.transpose(0, 1)
    mask = _mask(span.count, visible, call.window, batch, query)
    if call.softcap is not None or call.sinks is not None:
        return _attend_explicitly(call, query, seen_keys, seen_values, mask)
    output = scaled_dot_product_attention(
        query[None],
        seen_keys[None],
        seen_values[None],
        attn_mask=mask,
        scale=call.scale,
        enable_gqa=query.shape[0] != seen_keys.shape[0],
    )
    return output[0]


def _mask(
    count: int, visible: int, window: int | None, batch: PackedBatch, query: torch.Tensor
) -> torch.Tensor | None:
    """Which of `visible` tokens each of the last `count` attends to, bool; None if all do."""
    if count == 1:
        return None
    key = (count, visible, window)
    if key not in batch.masks:
        rows = torch.arange(visible - count, visible, device=query.device)[:, None]
        columns = torch.arange(visible, device=query.device)[None]
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
        batch.masks[key] = mask
    return batch.masks[key]


def _attend_explicitly(
    call: Call, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention in plain matrix products, for what SDPA cannot express."""
    heads, count, _ = query.shape
    groups = heads // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    weights = query @ keys.transpose(1, 2) * call.scale
    if call.softcap is not None:
        weights = torch.tanh(weights / call.softcap) * call.softcap
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks.reshape(heads, 1, 1).expand(heads, count, 1).to(weights.dtype)
        weights = torch.cat([weights, sinks], -1)
        probabilities = weights.softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        probabilities = weights.softmax(-1, dtype=torch.float32)
    return probabilities.to(query.dtype) @ values


AttentionInterface.register(NAME, packed_attention)
