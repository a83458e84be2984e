"""Attention by FlashAttention over the pages themselves, for half precision on CUDA.

`varlen_attn` (torch.nn.attention.varlen) reads keys and values through a block table: nothing is gathered or
padded, and the plan is a few tensors, so that a decoding batch can be captured in a CUDA graph (`graphs`). The
kernel of torch 2.11 takes no block table: it reads sequences whose pages follow one another, else a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from split_common.compat.torch import flash_attention_forward
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


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model on this device and in this dtype may use it at all."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


class FlashAttention:
    """The backend (`split_common.engine.attention.Backend`)."""

    name = "flash"
    page_tokens = PAGE_TOKENS

    def plan(self, pool: PagePool, spans: Sequence[Span], device: torch.device) -> FlashPlan:
        held = [span.sequence.pages for span in spans]
        table, lengths, begins = make_tables(spans, len(spans), max(map(len, held)))
        if not reads_in_place(spans):
            # Each one's own pages, one sequence after the other.
            table = torch.tensor([page for pages in held for page in pages], dtype=torch.int32)
            begins = _from_zero(map(len, held)) * PAGE_TOKENS
        ends = _from_zero(span.count for span in spans)
        most_queries = max(span.count for span in spans)
        return FlashPlan(ends, table, lengths, begins, most_queries, int(lengths.max())).on(device)


def reads_in_place(spans: Sequence[Span]) -> bool:
    """Whether the kernel reads sequences from the pool, and not from a copy of their pages."""
    return READS_PAGES or all(span.sequence.contiguous for span in spans)


def make_tables(
    spans: Sequence[Span], rows: int, pages: int, blank: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `table`, `lengths` and `begins` of a plan that reads in place, on the host.

    Rows that are missing have a token in a blank page.
    """
    missing = rows - len(spans)
    held = [span.sequence.pages for span in spans] + [[]] * missing
    table = np.array([row + [blank] * (pages - len(row)) for row in held], dtype=np.int32)
    lengths = np.array([span.sequence.length for span in spans] + [1] * missing, dtype=np.int32)
    begins = np.append(table[:, 0] * PAGE_TOKENS, 0).astype(np.int32)
    return torch.from_numpy(table), torch.from_numpy(lengths), torch.from_numpy(begins)


def _from_zero(counts: Iterable[int]) -> torch.Tensor:
    """Running sums, from 0 on."""
    return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)


@dataclass
class FlashPlan:
    """A batch of `n` spans.

    Args:
        ends: where each span begins in the batch, and the last one ends, int32 `[n + 1]`.
        table: each sequence's pages, int32 `[n, pages]`; what lies beyond its length is not read. If they are to be
            copied: all of them, int32 `[pages]`.
        lengths: of the sequences in tokens, int32 `[n]`.
        begins: the token at which each sequence begins in the pool, or in a copy of its pages, int32 `[n + 1]`; the
            last one is not read.
        most_queries, most_keys: of any span.
    """

    ends: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    begins: torch.Tensor
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
        if self.table.ndim == 1:
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
