"""transformers' logits processors for many rows at once, each row with numbers of its own.

Each function changes `scores`, float32 `[rows, vocabulary]`, in place, as the processors of the rows would by
themselves: the numbers are equal, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


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
    # Sorts values alone, which NumPy does many times as fast as torch sorts them with their places.
    ascending = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    rest = _column([1 - warper.top_p for warper in warpers])
    removed = (ascending.softmax(-1).cumsum(-1) <= rest).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
    least = ascending.gather(1, removed)
    # Of equal scores, the sort of places decides which are removed.
    tied = (removed > 0) & (ascending.gather(1, (removed - 1).clamp(min=0)) == least)
    kept = {row: scores[row : row + 1].clone() for row in tied[:, 0].nonzero()[:, 0].tolist()}
    scores.masked_fill_(scores < least, -torch.inf)
    for row, own in kept.items():
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
