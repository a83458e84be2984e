"""Attention by FlashAttention over the pages themselves, for half precision on CUDA.

`varlen_attn` (torch.nn.attention.varlen) reads keys and values through a block table: nothing is gathered or
padded, and the plan is a few tensors, so that a decoding batch can be captured in a CUDA graph (`graphs`). Torch
2.11, whose kernel takes no block table, is handed a copy of the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn

from split_common.engine.attention import Call, Span
from split_common.engine.pool import PagePool

#: FlashAttention 2 takes pages in multiples of 256 tokens.
PAGE_TOKENS = 256

#: Widest head that it takes.
MAX_WIDTH = 256

#: Whether it takes a block table: from torch 2.12 on.
READS_PAGES = "block_table" in (varlen_attn.__kwdefaults__ or ())

#: What `varlen_attn` calls; of 2.11, only this takes the lengths of keys that lie apart.
flash_attention_forward = torch.ops.aten._flash_attention_forward


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model on this device and in this dtype may use it at all."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


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
        keys, values = (stored.view(-1, PAGE_TOKENS, *stored.shape[1:]) for stored in (keys, values))
        # A last token sees all before it without being told; told so, the kernel would not divide long sequences.
        alone = self.most_queries == 1 and call.window is None
        window = (-1, -1) if alone else (-1 if call.window is None else call.window - 1, 0)
        here = self._on(query.device)
        attend = here._attend_pages if READS_PAGES else here._attend_copies
        return attend(query.transpose(0, 1), keys, values, call.scale, window).transpose(0, 1)

    def _on(self, device: torch.device) -> FlashPlan:
        """The plan where a layer is: a body may be spread over several devices."""
        if device == self.table.device:
            return self
        return replace(
            self, ends=self.ends.to(device), table=self.table.to(device), lengths=self.lengths.to(device)
        )

    def _attend_pages(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: tuple[int, int]
    ) -> torch.Tensor:
        output = varlen_attn(
            query,
            keys,
            values,
            self.ends,
            None,
            self.most_queries,
            self.most_keys,
            scale=scale,
            window_size=window,
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.lengths,
            block_table=self.table,
        )
        assert isinstance(output, torch.Tensor)
        return output

    @cached_property
    def _begins(self) -> torch.Tensor:
        """Where each sequence's copy begins, and the last one ends."""
        count, pages = self.table.shape
        return torch.arange(count + 1, dtype=torch.int32, device=self.table.device) * (pages * PAGE_TOKENS)

    def _attend_copies(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: tuple[int, int]
    ) -> torch.Tensor:
        output, *_ = flash_attention_forward(
            query,
            keys[self.table].flatten(0, 2),
            values[self.table].flatten(0, 2),
            self.ends,
            self._begins,
            self.most_queries,
            self.table.shape[1] * PAGE_TOKENS,
            0.0,
            window == (-1, 0),
            False,
            scale=scale,
            window_size_left=window[0],
            window_size_right=window[1],
            seqused_k=self.lengths,
        )
        assert isinstance(output, torch.Tensor)
        return output
