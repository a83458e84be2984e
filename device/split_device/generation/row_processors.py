"""transformers' logits processors for many rows at once, each row with numbers of its own.

Each function changes `scores`, float32 `[rows, vocabulary]`, in place, as the processors of the rows would by
themselves: the numbers are equal, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from split_device.generation.occurrences import Occurrences
from split_device.generation.penalties import OccurrencePenalty

#: How many of a row's likeliest tokens are looked at for `top_p`. If they do not suffice, all are sorted.
_LIKELIEST = 1024

#: `top_p` sorts all tokens if a sum of probabilities is as close to it as this: the sums that transformers takes
#: in float32 differ by up to 7e-6 from exact ones, so they may fall on the other side.
_DOUBT = 2e-5


def _column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def _repetition(scores: torch.Tensor, processors: Sequence[Any], texts: Sequence[Occurrences]) -> None:
    places, _, penalty = _places(scores, texts, [processor.penalty for processor in processors])
    flat = scores.view(-1)
    found = flat[places]
    flat[places] = torch.where(found < 0, found * penalty, found / penalty)


def _occurrence(scores: torch.Tensor, processors: Sequence[Any], texts: Sequence[Occurrences]) -> None:
    places, counts, frequency = _places(scores, texts, [processor.frequency for processor in processors])
    presence = _places(scores, texts, [processor.presence for processor in processors])[2]
    flat = scores.view(-1)
    flat[places] = flat[places] - frequency * counts - presence


def _places(
    scores: torch.Tensor, texts: Sequence[Occurrences], numbers: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the tokens of the rows' texts lie in the scores, if these were one row; how often each row's text has
    them; and the number of their row. All `[tokens]`."""
    width = scores.shape[1]
    found = [text.below(width) for text in texts]
    places = torch.cat([tokens + row * width for row, (tokens, _) in enumerate(found)])
    lengths = torch.tensor([len(tokens) for tokens, _ in found])
    return places, torch.cat([counts for _, counts in found]), torch.tensor(numbers).repeat_interleave(lengths)


def _temperature(scores: torch.Tensor, warpers: Sequence[Any], _texts: object) -> None:
    scores.div_(_column([warper.temperature for warper in warpers]))


def _top_k(scores: torch.Tensor, warpers: Sequence[Any], _texts: object) -> None:
    counts = [min(warper.top_k, scores.shape[1]) for warper in warpers]
    largest = scores.topk(max(counts)).values
    scores.masked_fill_(scores < largest.gather(1, torch.tensor(counts)[:, None] - 1), -torch.inf)


def _top_p(scores: torch.Tensor, warpers: Sequence[Any], _texts: object) -> None:
    """Without sorting the whole vocabulary, where that gives the same tokens for certain."""
    probabilities = scores.softmax(-1)
    count = min(_LIKELIEST, scores.shape[1])
    largest = probabilities.topk(count).values
    wanted = _column([warper.top_p for warper in warpers], torch.float64)
    # The sum of all that are likelier than each.
    before = largest.double().cumsum(1) - largest
    kept = (before < wanted).sum(1, keepdim=True)
    inside = largest.gather(1, (kept - 1).clamp(min=0))
    outside = largest.gather(1, kept.clamp(max=count - 1))
    doubtful = ((before - wanted).abs() < _DOUBT).any(1) | (kept == count)[:, 0] | (inside == outside)[:, 0]
    sorted_rows = {row: scores[row : row + 1].clone() for row in doubtful.nonzero()[:, 0].tolist()}
    scores.masked_fill_(probabilities < inside, -torch.inf)
    for row, own in sorted_rows.items():
        scores[row] = warpers[row](None, own)[0]


def _min_p(scores: torch.Tensor, warpers: Sequence[Any], _texts: object) -> None:
    probabilities = scores.softmax(-1)
    least = _column([warper.min_p for warper in warpers]) * probabilities.amax(-1, keepdim=True)
    scores.masked_fill_(probabilities < least, -torch.inf)


#: Processors that are applied to many rows at once, in the order in which `generate` has them. Each function takes
#: the scores, the processor of each row, and what the processor counts in each row's text.
TOGETHER: dict[type, Callable[[torch.Tensor, Sequence[Any], Sequence[Any]], None]] = {
    RepetitionPenaltyLogitsProcessor: _repetition,
    OccurrencePenalty: _occurrence,
    TemperatureLogitsWarper: _temperature,
    TopKLogitsWarper: _top_k,
    TopPLogitsWarper: _top_p,
    MinPLogitsWarper: _min_p,
}
