"""A batch that one backend attends to in part: kernels that know causal masks alone leave the rest to SDPA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from split_common.engine.attention import AttentionCall, AttentionPlan, Backend, Span
from split_common.engine.pool import PagePool
from split_common.engine.sdpa import SdpaAttention


@dataclass(frozen=True)
class MixedPlan:
    """One plan for the first `tokens` tokens of a batch, and one for all others."""

    first: AttentionPlan
    second: AttentionPlan
    tokens: int

    def attend(
        self, call: AttentionCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        outputs = [self.first.attend(call, query[:, : self.tokens], keys, values)]
        # Its spans say where their tokens are in the whole batch.
        outputs.append(self.second.attend(call, query, keys, values))
        return torch.cat(outputs, 1)


def plan_batch(backend: Backend, pool: PagePool, spans: Sequence[Span], device: torch.device) -> AttentionPlan:
    """The plan of a batch in which spans that are not causal come last.

    Args:
        backend: attends to all spans that are causal, and to all others if it can.
        pool: holds the keys and values.
        spans: the batch.
        device: of its layers.
    """
    causal = [span for span in spans if span.is_causal]
    if backend.any_mask or len(causal) == len(spans):
        return backend.plan(pool, spans, device)
    others = SdpaAttention().plan(pool, spans[len(causal) :], device)
    if not causal:
        return others
    return MixedPlan(backend.plan(pool, causal, device), others, sum(span.count for span in causal))
