"""Chooses the next tokens of many requests at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from split_common.errors import ConfigError, ModelError
from split_device.generation.logprobs import logprobs_of
from split_device.generation.request import Logprobs
from split_device.generation.row_processors import TOGETHER
from split_device.generation.sampling import Sampler

#: A token and its log probabilities if requested, or why none can be chosen.
Choice = tuple[int, Logprobs | None] | Exception

_ORDER = list(TOGETHER)


def choose_tokens(samplers: Sequence[Sampler], logits: torch.Tensor) -> list[Choice]:
    """Chooses a token for each row: the same as each row would get alone. An error concerns its row alone.

    Args:
        samplers: what each row's request asks for. Their random generators go on.
        logits: float32 `[rows, vocabulary]`.
    """
    likeliest = logits.argmax(-1)
    # A NaN counts as the largest of its row.
    failing = logits.gather(-1, likeliest[:, None])[:, 0].isnan().nonzero()[:, 0].tolist()
    tokens = likeliest.tolist()
    errors: dict[int, Exception] = {}
    chosen = [row for row, sampler in enumerate(samplers) if not sampler.likeliest]
    if chosen:
        own = [samplers[row] for row in chosen]
        scores = logits[chosen]
        failed = _process(own, scores)
        found = scores.argmax(-1)
        drawn = [index for index, sampler in enumerate(own) if sampler.generator and index not in failed]
        if drawn:
            found[drawn] = _draw([own[index] for index in drawn], scores[drawn], failed, drawn)
        for row, token in zip(chosen, found.tolist(), strict=True):
            tokens[row] = token
        errors = {chosen[index]: error for index, error in failed.items()}
    errors |= {row: ModelError("the model's logits hold NaN: are its weights damaged?") for row in failing}
    logprobs = _logprobs(samplers, logits, tokens)
    return [errors.get(row) or (token, logprobs.get(row)) for row, token in enumerate(tokens)]


def _process(samplers: Sequence[Sampler], scores: torch.Tensor) -> dict[int, Exception]:
    """Applies the logits processors of each row in their order. Returns the errors of rows that failed."""
    errors: dict[int, Exception] = {}
    queues: list[deque[Any]] = [deque(sampler.processors) for sampler in samplers]
    while True:
        for row, queue in enumerate(queues):
            try:
                while queue and type(queue[0]) not in TOGETHER:
                    scores[row] = queue.popleft()(samplers[row].ids, scores[row : row + 1])[0]
            except Exception as error:
                errors[row] = error
                queue.clear()
        heads = [type(queue[0]) for queue in queues if queue]
        if not heads:
            return errors
        kind = min(heads, key=_ORDER.index)
        rows = [row for row, queue in enumerate(queues) if queue and type(queue[0]) is kind]
        texts = [samplers[row].occurrences.get(kind) for row in rows]
        part = scores if len(rows) == len(scores) else scores[rows]
        TOGETHER[kind](part, [queues[row].popleft() for row in rows], texts)
        if part is not scores:
            scores[rows] = part


def _draw(
    samplers: Sequence[Sampler], scores: torch.Tensor, errors: dict[int, Exception], rows: Sequence[int]
) -> torch.Tensor:
    """Draws a token in each row, as `torch.multinomial` does with the generator of the row.

    Args:
        errors: takes the errors of rows in which no token can be drawn, by their numbers in `rows`.
    """
    probabilities = scores.softmax(-1)
    possible = probabilities.amax(-1).isfinite().tolist()
    noise = torch.ones_like(probabilities)
    for row, sampler, own, fine in zip(rows, samplers, noise, possible, strict=True):
        if fine:
            own.exponential_(1, generator=sampler.generator)
        else:
            errors[row] = ConfigError("no token can be drawn; is the temperature too small?")
    return probabilities.div_(noise).argmax(-1)


def _logprobs(samplers: Sequence[Sampler], logits: torch.Tensor, tokens: Sequence[int]) -> dict[int, Logprobs]:
    """Log probabilities of the rows that want them."""
    counts = {row: sampler.logprobs for row, sampler in enumerate(samplers) if sampler.logprobs is not None}
    if not counts:
        return {}
    rows = list(counts)
    found = logprobs_of(logits[rows], [tokens[row] for row in rows], [*counts.values()])
    return dict(zip(rows, found, strict=True))
