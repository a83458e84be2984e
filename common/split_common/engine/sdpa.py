"""Attention by torch's SDPA on any device: span by span, but many short decoding spans in one call.

If a sequence's pages are contiguous, its keys and values are one slice, which is read without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from split_common.engine.attention import AttentionCall, Span
from split_common.engine.pool import DEFAULT_PAGE_TOKENS, PagePool
from split_common.engine.trees import seen_in_tree

#: Most tokens in the padded keys of all decoding sequences, if one call is to attend to all of them.
BATCHED_TOKENS = 8192

#: Fewest decoding sequences for which one call attends to all of them.
BATCHED_SEQUENCES = 4

#: Most bytes of keys and values of a sequence on the CPU, if one call is to attend to all. That call reads copies,
#: and beyond this they take longer than a call for each sequence.
BATCHED_BYTES = 256 * 1024

#: Most tokens of a prompt on the CPU that attend in one call. For each of them it computes the logits of all keys
#: that the last one sees.
BLOCK_TOKENS = 128


class SdpaAttention:
    """SDPA (a `split_common.engine.attention.Backend`)."""

    name = "sdpa"
    page_tokens = DEFAULT_PAGE_TOKENS
    capturable = False
    any_mask = True

    def plan(self, pool: PagePool, spans: Sequence[Span], device: torch.device) -> SdpaPlan:
        return SdpaPlan(spans)


class SdpaPlan:
    """A batch of spans, those of one token first. Keeps masks and gathered slots for the following layers."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}
        self._gathers: dict[tuple[int | None, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, call: AttentionCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        plain = call.softcap is None and call.sinks is None
        batched = self._decoding(call.window, _most_tokens(keys, values)) if plain else []
        parts: list[torch.Tensor] = []
        if batched:
            parts.append(self._attend_batched(call, query[:, : len(batched)], keys, values, batched))
        for span in self._spans[len(batched) :]:
            parts.append(self._attend_one(call, query[:, span.begin : span.begin + span.count], span, keys, values))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _decoding(self, window: int | None, most: int) -> Sequence[Span]:
        """The batch's leading spans of one token; empty if they are few, or if one sees more than `most` tokens."""
        count = 0
        longest = 0
        for span in self._spans:
            if span.count != 1:
                break
            longest = max(longest, _visible(span.sequence.length, window))
            count += 1
        few = count < BATCHED_SEQUENCES or count * longest > BATCHED_TOKENS
        return [] if few or longest > most else self._spans[:count]

    def _attend_batched(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        spans: Sequence[Span],
    ) -> torch.Tensor:
        key = call.window, query.device
        if key not in self._gathers:
            self._gathers[key] = _gather(spans, call.window, query)
        slots, mask = self._gathers[key]
        count, longest = len(spans), mask.shape[-1]
        heads, key_heads = query.shape[0], keys.shape[1]
        gathered_keys = keys.index_select(0, slots).view(count, longest, key_heads, -1).transpose(1, 2)
        gathered_values = values.index_select(0, slots).view(count, longest, key_heads, -1).transpose(1, 2)
        grouped = query.transpose(0, 1).reshape(count, key_heads, heads // key_heads, -1)
        output = scaled_dot_product_attention(
            grouped, gathered_keys, gathered_values, attn_mask=mask, scale=call.scale
        )
        return output.reshape(count, heads, -1).transpose(0, 1)

    def _attend_one(
        self, call: AttentionCall, query: torch.Tensor, span: Span, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        sequence, count = span.sequence, span.count
        visible = sequence.length if call.window is None else min(sequence.length, call.window + count - 1)
        first = sequence.length - visible
        if sequence.contiguous:
            origin = sequence.pages[0] * sequence.pool.page_tokens
            seen = slice(origin + first, origin + sequence.length)
            seen_keys, seen_values = keys[seen], values[seen]
        else:
            slots = torch.from_numpy(sequence.slots(first)).to(keys.device)
            seen_keys, seen_values = keys.index_select(0, slots), values.index_select(0, slots)
        seen_keys, seen_values = seen_keys.transpose(0, 1), seen_values.transpose(0, 1)
        whole = not span.is_causal or query.device.type != "cpu"
        parts: list[torch.Tensor] = []
        for begin in range(0, count, count if whole else BLOCK_TOKENS):
            part = query if whole else query[:, begin : begin + BLOCK_TOKENS]
            rows = part.shape[1]
            # The last key that a token of this part sees, and the first one.
            end = visible - count + begin + rows
            start = 0 if call.window is None else max(0, end - (call.window + rows - 1))
            mask = self._mask(rows, visible, call.window, query, span)
            if mask is not None:
                # Tokens see the same keys relative to themselves.
                mask = mask[:, visible - (end - start) :]
            parts.append(_attend(call, part, seen_keys[:, start:end], seen_values[:, start:end], mask))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _mask(
        self,
        count: int,
        visible: int,
        window: int | None,
        query: torch.Tensor,
        span: Span,
    ) -> torch.Tensor | None:
        """What is added to the logits of the last `count` of `visible` tokens of a span, `[count, visible]`.

        None if there is one, which attends to all.
        """
        if count == 1:
            return None
        key = (count, visible, window, query.device, span.both_ways, span.parents)
        if key not in self._masks:
            seen = _seen(count, visible, window, span).to(query.device)
            # SDPA would make these numbers of a mask of booleans in each layer.
            mask = torch.zeros(count, visible, dtype=query.dtype, device=query.device)
            self._masks[key] = mask.masked_fill_(~seen, float("-inf"))
        return self._masks[key]


def _attend(
    call: AttentionCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attends tokens `[heads, tokens, width]` to keys and values `[key_heads, seen, width]`."""
    if call.softcap is not None or call.sinks is not None:
        return _attend_explicitly(call, query, keys, values, mask)
    heads, count, key_heads = query.shape[0], query.shape[1], keys.shape[0]
    if count == 1:
        # The queries that share a key are as tokens of one head, of which each sees everything.
        query = query.reshape(key_heads, heads // key_heads, -1)
    output = scaled_dot_product_attention(
        query[None],
        keys[None],
        values[None],
        attn_mask=mask,
        scale=call.scale,
        enable_gqa=query.shape[0] != key_heads,
    )
    return output[0].reshape(heads, count, -1)


def _seen(count: int, visible: int, window: int | None, span: Span) -> torch.Tensor:
    """Which of `visible` tokens the last `count` of them attend to, bool `[count, visible]`."""
    if span.parents:
        return seen_in_tree(span.parents, visible - count, window)
    rows = torch.arange(visible - count, visible)[:, None]
    columns = torch.arange(visible)[None]
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    for begin, end in span.both_ways:
        ahead = visible - count + end
        seen[begin:end] |= (columns > rows[begin:end]) & (columns < ahead)
    return seen


def _most_tokens(keys: torch.Tensor, values: torch.Tensor) -> int:
    """Most tokens of a sequence whose keys and values are worth a copy."""
    if keys.device.type != "cpu":
        return BATCHED_TOKENS
    return BATCHED_BYTES // (keys[:1].nbytes + values[:1].nbytes)


def _visible(length: int, window: int | None) -> int:
    return length if window is None else min(length, window)


def _gather(spans: Sequence[Span], window: int | None, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of all spans' visible tokens, padded on the left to the longest span, and the mask of the padding.

    Returns:
        Slots, int64 `[spans * longest]`, and a mask `[spans, 1, 1, longest]` to add to the logits.
    """
    longest = max(_visible(span.sequence.length, window) for span in spans)
    slots = np.zeros((len(spans), longest), dtype=np.int64)
    mask = torch.full((len(spans), 1, 1, longest), float("-inf"), dtype=query.dtype)
    for index, span in enumerate(spans):
        visible = _visible(span.sequence.length, window)
        slots[index, longest - visible :] = span.sequence.slots(span.sequence.length - visible)
        # Padding repeats a visible token, because a free slot may hold NaN, which a mask does not remove from a
        # sum.
        slots[index, : longest - visible] = slots[index, longest - visible]
        mask[index, :, :, longest - visible :] = 0.0
    return torch.from_numpy(slots.reshape(-1)).to(query.device), mask.to(query.device)


def _attend_explicitly(
    call: AttentionCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention in plain matrix products, for capped logits and sinks, which SDPA does not support."""
    heads, count, _ = query.shape
    groups = heads // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    weights = query @ keys.transpose(1, 2) * call.scale
    if call.softcap is not None:
        weights = torch.tanh(weights / call.softcap) * call.softcap
    if mask is not None:
        weights = weights + mask
    if call.sinks is not None:
        sinks = call.sinks.reshape(heads, 1, 1).expand(heads, count, 1).to(weights.dtype)
        weights = torch.cat([weights, sinks], -1)
        probabilities = weights.softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        probabilities = weights.softmax(-1, dtype=torch.float32)
    return probabilities.to(query.dtype) @ values
