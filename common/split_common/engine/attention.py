"""Attention of packed sequences over their pages, which transformers' layers call instead of their own.

`packed_attention` is registered with transformers' `AttentionInterface`. It finds the current batch through a
context variable, because some layers drop keyword arguments. A backend computes the attention: `sdpa` runs on every
device and supports every call, `flash` is for half precision on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

from split_common.engine.pool import PagedSequence, PagePool

#: The name under which `packed_attention` is registered with transformers.
ATTENTION_NAME = "lambda_split_packed"


@dataclass(frozen=True)
class AttentionCall:
    """What a layer passes to its attention, except for query, keys and values."""

    layer: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Span:
    """The tokens `[begin, begin + count)` of the packed batch, which are the last tokens of a sequence."""

    sequence: PagedSequence
    begin: int
    count: int
    #: Begin and end, in the span, of tokens that each attend to those after them as well.
    both_ways: tuple[tuple[int, int], ...] = ()
    #: The token of the span that each one follows, -1 for the sequence's last one before the span; empty if each
    #: follows the one before it.
    parents: tuple[int, ...] = ()

    @property
    def is_causal(self) -> bool:
        """Whether each token attends to all tokens before it, and to no others."""
        return not self.both_ways and not self.parents


class AttentionPlan(Protocol):
    """How one batch is attended to. Computed once for all layers."""

    def attend(
        self, call: AttentionCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Attends each span to its own sequence.

        Args:
            query: `[heads, tokens, key_width]`, packed.
            keys, values: a layer's whole storage in the pool, `[slots, key_heads, width]`.

        Returns:
            `[heads, tokens, value_width]`.

        Raises:
            NotImplementedError: the backend does not support the call.
        """


class Backend(Protocol):
    """A way to compute attention over pages."""

    #: Its name in messages and `worker --json`.
    name: str
    #: Tokens in a page of its pools.
    page_tokens: int
    #: Whether decoding batches can be captured in CUDA graphs.
    capturable: bool
    #: Whether it attends to spans that are not causal. If not, `sdpa` attends to these.
    any_mask: bool

    def plan(self, pool: PagePool, spans: Sequence[Span], device: torch.device) -> AttentionPlan:
        """Prepares the attention of a batch, whose layers begin on `device`."""


@dataclass
class PackedBatch:
    """The current batch: where its keys and values go, and how it is attended to."""

    pool: PagePool
    #: Tokens of each sequence, in the order of the batch. The last entry may be padding.
    counts: Sequence[int]
    #: Slots of the sequences' new tokens in the pool, int64 `[tokens]`.
    slots: torch.Tensor
    plan: AttentionPlan
    _slots: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def slots_on(self, device: torch.device) -> torch.Tensor:
        """The slots on a layer's device, since a body may be spread over several."""
        if device not in self._slots:
            self._slots[device] = self.slots.to(device)
        return self._slots[device]


#: The batch that the layers are running over.
current: ContextVar[PackedBatch] = ContextVar("packed batch")

#: The calls so far, each with the names of the layer's further arguments; None unless the layers are being probed.
recording: ContextVar[list[tuple[AttentionCall, list[str]]] | None] = ContextVar("recorded calls", default=None)


def call_of(
    module: torch.nn.Module,
    query: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> AttentionCall:
    """What a layer asks of its attention, by the arguments of transformers' attention interface."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return AttentionCall(int(module.layer_idx), scale, sliding_window, softcap, s_aux)  # type: ignore[arg-type]


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
    """Attention over a packed batch, with the signature of transformers' attention interface.

    Args:
        query: `[1, heads, tokens, key_width]`. The last tokens may be padding, which has no slots.
        key, value: `[1, key_heads, tokens, width]` of the same tokens.
        sliding_window: how many tokens each token attends to, including itself.
        softcap: attention logits are capped to ±softcap (Gemma 2 report, arXiv 2408.00118).
        s_aux: learned logits `[heads]` that take part of the attention (attention sinks, arXiv 2309.17453).

    Returns:
        `[1, tokens, heads, value_width]`, contiguous, because some layers view it as `[1, tokens, width]`.
    """
    call = call_of(module, query, scaling, sliding_window, softcap, s_aux)
    recorded = recording.get()
    if recorded is not None:
        recorded.append((call, [name for name, value in other.items() if value is not None]))
    batch = current.get()
    keys, values = batch.pool.storage(call.layer, key, value)
    slots = batch.slots_on(keys.device)
    tokens, padding = len(slots), query.shape[2] - len(slots)
    keys.index_copy_(0, slots, key[0, :, :tokens].transpose(0, 1))
    values.index_copy_(0, slots, value[0, :, :tokens].transpose(0, 1))
    output = batch.plan.attend(call, query[0, :, :tokens], keys, values).transpose(0, 1)
    if padding:
        output = pad(output, (0, 0, 0, 0, 0, padding))
    return output[None].contiguous(), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
