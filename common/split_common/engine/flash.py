"""Attention by FlashAttention over the pages themselves, for half precision on CUDA.

`varlen_attn` (torch.nn.attention.varlen) reads keys and values through a block table: nothing is gathered or
padded, and the plan is a few tensors, so that a decoding batch can be captured in a CUDA graph (`graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from split_common.engine.attention import Call, Span
from split_common.engine.pool import PagePool

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

#: FlashAttention 2 takes pages in multiples of 256 tokens.
PAGE_TOKENS = 256

#: Widest head that it takes.
MAX_WIDTH = 256


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model on this device and in this dtype may use it at all; torch reads pages from 2.12 on."""
    half = dtype in (torch.bfloat16, torch.float16)
    reads_pages = "block_table" in (getattr(varlen_attn, "__kwdefaults__", None) or ())
    return device.type == "cuda" and half and reads_pages


class FlashAttention:
    """The backend (`split_common.engine.attention.Backend`)."""

    name = "flash"
    page_tokens = PAGE_TOKENS

    def plan(self, pool: PagePool, spans: Sequence[Span], device: torch.device) -> FlashPlan:
        most = max(len(span.sequence.pages) for span in spans)
        table = [span.sequence.pages + [0] * (most - len(span.sequence.pages)) for span in spans]
        ends = accumulate((span.count for span in spans), initial=0)
        lengths = [span.sequence.length for span in spans]
        return FlashPlan(
            torch.tensor(list(ends), dtype=torch.int32).to(device, non_blocking=True),
            torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True),
            torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True),
            max(span.count for span in spans),
            max(lengths),
        )


@dataclass
class FlashPlan:
    """A batch of `n` spans.

    Args:
        ends: where each span begins in the batch, and the last one ends, int32 `[n + 1]`.
        table: each sequence's pages, int32 `[n, pages]`; what lies beyond its length is not read.
        lengths: of the sequences in tokens, int32 `[n]`.
        most_queries, most_keys: of any span.
    """

    ends: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    most_queries: int
    most_keys: int

    def attend(self, call: Call, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if call.softcap is not None or call.sinks is not None:
            raise NotImplementedError("FlashAttention here caps no logits and has no sinks")
        if keys.shape[-1] != values.shape[-1] or keys.shape[-1] > MAX_WIDTH:
            raise NotImplementedError(f"FlashAttention takes keys as wide as values, at most {MAX_WIDTH}")
        device = query.device
        output = varlen_attn(
            query.transpose(0, 1),
            keys.view(-1, PAGE_TOKENS, *keys.shape[1:]),
            values.view(-1, PAGE_TOKENS, *values.shape[1:]),
            self.ends.to(device),
            None,
            self.most_queries,
            self.most_keys,
            scale=call.scale,
            window_size=(-1 if call.window is None else call.window - 1, 0),
            enable_gqa=query.shape[0] != keys.shape[1],
            seqused_k=self.lengths.to(device),
            block_table=self.table.to(device),
        )
        assert isinstance(output, torch.Tensor)
        return output.transpose(0, 1)
