"""Attention by FlashAttention over the pages themselves, for half precision on CUDA.

`varlen_attn` (torch.nn.attention.varlen) reads keys and values through a block table: nothing is gathered or
padded, and the plan is a few tensors, so that a decoding batch can be captured in a CUDA graph (`graphs`). The
kernel of torch 2.11 takes no block table: it reads sequences whose pages follow one another, others are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
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

#: Those of a plan's members that are on a device.
TABLES = ("ends", "table", "lengths", "begins")

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
        ends = torch.tensor(list(accumulate((span.count for span in spans), initial=0)), dtype=torch.int32)
        pages = max(len(span.sequence.pages) for span in spans)
        table, lengths, begins = make_tables(spans, len(spans), pages)
        most_queries = max(span.count for span in spans)
        plan = FlashPlan(ends, table, lengths, begins, most_queries, int(lengths.max()), in_place(spans))
        return plan.on(device)


def in_place(spans: Sequence[Span]) -> bool:
    """Whether the pages of each sequence follow one another."""
    return all(span.sequence.contiguous for span in spans)


def make_tables(
    spans: Sequence[Span], rows: int, pages: int, blank: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A plan's `table`, `lengths` and `begins` on the host; rows that are missing have a token in a blank page."""
    held = [span.sequence.pages for span in spans] + [[]] * (rows - len(spans))
    table = np.array([row + [blank] * (pages - len(row)) for row in held], dtype=np.int32)
    lengths = np.array([span.sequence.length for span in spans] + [1] * (rows - len(spans)), dtype=np.int32)
    first = table[:, 0] if in_place(spans) else np.arange(rows, dtype=np.int32) * pages
    begins = np.append(first, 0).astype(np.int32) * PAGE_TOKENS
    return torch.from_numpy(table), torch.from_numpy(lengths), torch.from_numpy(begins)


@dataclass
class FlashPlan:
    """A batch of `n` spans.

    Args:
        ends: where each span begins in the batch, and the last one ends, int32 `[n + 1]`.
        table: each sequence's pages, int32 `[n, pages]`; what lies beyond its length is not read.
        lengths: of the sequences in tokens, int32 `[n]`.
        begins: the token at which each sequence begins in the pool, or in a copy of its pages, int32 `[n + 1]`; the
            last one is not read.
        most_queries, most_keys: of any span.
        in_place: whether no copy is needed.
    """

    ends: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    begins: torch.Tensor
    most_queries: int
    most_keys: int
    in_place: bool

    def attend(self, call: Call, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if call.softcap is not None or call.sinks is not None:
            raise NotImplementedError("FlashAttention here caps no logits and has no sinks")
        if keys.shape[-1] != values.shape[-1] or keys.shape[-1] > MAX_WIDTH:
            raise NotImplementedError(f"FlashAttention takes keys as wide as values, at most {MAX_WIDTH}")
        keys, values = (stored.view(-1, PAGE_TOKENS, *stored.shape[1:]) for stored in (keys, values))
        # A last token sees all before it without being told; told so, the kernel would not divide long sequences.
        alone = self.most_queries == 1 and call.window is None
        window = (-1, -1) if alone else (-1 if call.window is None else call.window - 1, 0)
        here = self.on(query.device)
        attend = here._attend_pages if READS_PAGES else here._attend_sequences
        return attend(query.transpose(0, 1), keys, values, call.scale, window).transpose(0, 1)

    def on(self, device: torch.device) -> FlashPlan:
        """The plan where a layer is: a body may be spread over several devices."""
        if device == self.table.device:
            return self
        tables = {name: getattr(self, name).to(device, non_blocking=True) for name in TABLES}
        return replace(self, **tables)

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

    def _attend_sequences(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: tuple[int, int]
    ) -> torch.Tensor:
        if not self.in_place:
            keys, values = keys[self.table], values[self.table]
        output, *_ = flash_attention_forward(
            query,
            keys.view(-1, *keys.shape[-2:]),
            values.view(-1, *values.shape[-2:]),
            self.ends,
            self.begins,
            self.most_queries,
            self.most_keys,
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
