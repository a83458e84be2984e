"""Embeds what enters the head: the next tokens of many requests, long prompts in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from split_common.engine.scheduler import is_prefill
from split_device.generation.active import ActiveRequest
from split_device.generation.local_layers import LocalLayers

#: Most tokens of a prompt that leave the head together: they travel while the next ones are computed.
PART_TOKENS = 256

#: A request, the index of its first new token, and the states `[tokens, width]` of these.
Embedded = tuple[ActiveRequest, int, torch.Tensor]


def embed_next(layers: LocalLayers, requests: Sequence[ActiveRequest]) -> Iterator[Embedded]:
    """Embeds the first tokens that are pending of each request; those of decoding steps together.

    They count as entered: `head_tokens` goes on. A long prompt is yielded in parts, which go through the head one
    after the other.
    """
    entering = [(request, tokens) for request in requests for tokens in request.take_pending()]
    decoding = [each for each in entering if not is_prefill(len(each[1]))]
    prefilling = [each for each in entering if is_prefill(len(each[1]))]
    for together in ([decoding] if decoding else []) + [[each] for each in prefilling]:
        yield from _embed(layers, *zip(*together, strict=True))


def _embed(
    layers: LocalLayers, requests: Sequence[ActiveRequest], tokens: Sequence[list[int]]
) -> Iterator[Embedded]:
    begins = []
    for request, part in zip(requests, tokens, strict=True):
        begins.append(request.head_tokens)
        request.head_tokens += len(part)
    positions = [
        position
        for request, begin, part in zip(requests, begins, tokens, strict=True)
        for position in request.positions(begin, len(part))
    ]
    adapters = [request.adapter for request, part in zip(requests, tokens, strict=True) for _ in part]
    states = layers.embed([token for part in tokens for token in part], positions, adapters)
    for request, begin, own in zip(requests, begins, torch.split(states, [*map(len, tokens)]), strict=True):
        pieces = torch.chunk(request.with_images(begin, own), _parts(layers, request, len(own)))
        request.parts_to_send = len(pieces)
        for piece in pieces:
            yield request, begin, piece
            begin += len(piece)


def _parts(layers: LocalLayers, request: ActiveRequest, tokens: int) -> int:
    """In how many parts the next tokens of a request travel."""
    whole = layers.indivisible or request.undivided or request.placed is not None
    if whole or request.generation.request.prompt_logprobs is not None:
        return 1
    return max(1, -(-tokens // PART_TOKENS))
