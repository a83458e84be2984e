"""Log probabilities of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from split_device.generation.request import Logprobs


def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """Log probabilities of one token in each row.

    Args:
        logits: float32 `[rows, vocabulary]`.
        tokens: the token of each row.
        counts: number of most likely tokens to report with each.
    """
    every = torch.log_softmax(logits, -1)
    chosen = every.gather(1, torch.tensor(tokens, dtype=torch.long)[:, None])
    ranks = (every >= chosen).sum(-1).tolist()
    top = every.topk(min(max(counts, default=0), every.shape[1]))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        Logprobs(value, list(zip(ids[:count], values[:count], strict=True)), rank)
        for value, rank, (ids, values), count in zip(chosen[:, 0].tolist(), ranks, likeliest, counts, strict=True)
    ]
