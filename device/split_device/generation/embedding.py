"""Embeds what enters the head: the next tokens of many requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from split_common.engine.scheduler import is_prefill
from split_device.generation.active import ActiveRequest
from split_device.generation.local_layers import LocalLayers

#: A request, the index of its first new token, and the states `[tokens, width]` of these.
Embedded = tuple[ActiveRequest, int, torch.Tensor]


def embed_next(layers: LocalLayers, requests: Sequence[ActiveRequest]) -> Iterator[Embedded]:
    """Embeds the first tokens that are pending of each request; those of decoding steps together.

    They count as entered: `head_tokens` goes on.
    """
    decoding = [request for request in requests if not is_prefill(len(request.pending[0]))]
    prefilling = [request for request in requests if is_prefill(len(request.pending[0]))]
    for together in ([decoding] if decoding else []) + [[request] for request in prefilling]:
        yield from _embed(layers, together)


def _embed(layers: LocalLayers, requests: Sequence[ActiveRequest]) -> Iterator[Embedded]:
    tokens = [request.pending.popleft() for request in requests]
    begins = [request.head_tokens for request in requests]
    positions = [
        position
        for request, begin, part in zip(requests, begins, tokens, strict=True)
        for position in request.positions(begin, len(part))
    ]
    adapters = [request.adapter for request, part in zip(requests, tokens, strict=True) for _ in part]
    states = layers.embed([token for part in tokens for token in part], positions, adapters)
    for request, begin, part in zip(requests, begins, torch.split(states, [*map(len, tokens)]), strict=True):
        request.head_tokens += len(part)
        yield request, begin, request.with_images(begin, part)
