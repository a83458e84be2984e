"""Attention by FlashAttention over the pages themselves, for half precision on CUDA.

`varlen_attn` (torch.nn.attention.varlen) reads keys and values through a block table: nothing is gathered or
padded. The plan is a few tensors, so that a decoding batch can be captured in a CUDA graph (`graphs`). In torch
2.11 the kernel does not take a block table: sequences whose pages are contiguous are read in place, all others are
copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from split_common.compat.torch import flash_attention_forward
from split_common.engine.attention import AttentionCall, Span
from split_common.engine.pool import PagePool

#: Tokens in a page. FlashAttention 2 requires a multiple of 256.
FLASH_PAGE_TOKENS = 256

#: The widest head that the kernel supports.
MAX_HEAD_WIDTH = 256

#: Whether the kernel takes a block table, as it does from torch 2.12 on.
READS_PAGES = "block_table" in (varlen_attn.__kwdefaults__ or ())

#: The names of the tensors in a plan.
TABLES = ("cu_seqlens_q", "block_table", "seqused_k", "cu_seqlens_k")


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention supports models on this device and in this dtype."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


class FlashAttention:
    """FlashAttention (a `split_common.engine.attention.Backend`)."""

    name = "flash"
    page_tokens = FLASH_PAGE_TOKENS
    capturable = True
    any_mask = False

    def plan(self, pool: PagePool, spans: Sequence[Span], device: torch.device) -> FlashPlan:
        held = [span.sequence.pages for span in spans]
        block_table, seqused_k, cu_seqlens_k = make_tables(spans, len(spans), max(map(len, held)))
        if not reads_in_place(spans):
            # The pages of all sequences, one sequence after the other.
            block_table = torch.tensor([page for pages in held for page in pages], dtype=torch.int32)
            cu_seqlens_k = _cumulated(map(len, held)) * FLASH_PAGE_TOKENS
        return FlashPlan(
            cu_seqlens_q=_cumulated(span.count for span in spans),
            cu_seqlens_k=cu_seqlens_k,
            seqused_k=seqused_k,
            block_table=block_table,
            max_seqlen_q=max(span.count for span in spans),
            max_seqlen_k=int(seqused_k.max()),
        ).on(device)


def reads_in_place(spans: Sequence[Span]) -> bool:
    """Whether the kernel reads the sequences from the pool rather than from a copy of their pages."""
    return READS_PAGES or all(span.sequence.contiguous for span in spans)


def make_tables(
    spans: Sequence[Span], rows: int, pages: int, scratch: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `block_table`, `seqused_k` and `cu_seqlens_k` of a plan that reads in place, on the host.

    Args:
        spans: the batch.
        rows: of the tables. Those beyond the spans are padding: sequences of one token in the scratch page.
        pages: columns of the block table.
        scratch: the page that fills unused entries of the block table.
    """
    missing = rows - len(spans)
    held = [span.sequence.pages.tolist() for span in spans] + [[]] * missing
    block_table = np.array([row + [scratch] * (pages - len(row)) for row in held], dtype=np.int32)
    seqused_k = np.array([span.sequence.length for span in spans] + [1] * missing, dtype=np.int32)
    cu_seqlens_k = np.append(block_table[:, 0] * FLASH_PAGE_TOKENS, 0).astype(np.int32)
    return torch.from_numpy(block_table), torch.from_numpy(seqused_k), torch.from_numpy(cu_seqlens_k)


def _cumulated(counts: Iterable[int]) -> torch.Tensor:
    """Running sums from 0 on, int32."""
    return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)


@dataclass(kw_only=True)
class FlashPlan:
    """A batch of `n` spans, in FlashAttention's own terms.

    Args:
        cu_seqlens_q: where each span begins in the batch, and where the last one ends, int32 `[n + 1]`.
        cu_seqlens_k: the token at which each sequence begins in the pool, or in the copy of its pages, int32
            `[n + 1]`. The last entry is not read, because `seqused_k` says where the sequences end.
        seqused_k: lengths of the sequences in tokens, int32 `[n]`.
        block_table: each sequence's pages, int32 `[n, pages]`; entries beyond its length are not read. If the pages
            have to be copied: those of all sequences, one sequence after the other, int32 `[pages]`.
        max_seqlen_q: tokens in the longest span.
        max_seqlen_k: tokens in the longest sequence.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    #: The plan on other devices, once layers there have needed it.
    _elsewhere: dict[torch.device, FlashPlan] = field(default_factory=dict, init=False, repr=False)

    def attend(
        self, call: AttentionCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        if call.softcap is not None or call.sinks is not None:
            raise NotImplementedError("this FlashAttention backend supports neither capped logits nor sinks")
        if keys.shape[-1] != values.shape[-1] or keys.shape[-1] > MAX_HEAD_WIDTH:
            raise NotImplementedError(f"FlashAttention needs keys as wide as values, at most {MAX_HEAD_WIDTH}")
        keys, values = (stored.view(-1, FLASH_PAGE_TOKENS, *stored.shape[1:]) for stored in (keys, values))
        # A single query at the end sees all keys anyway. Without a causal mask the kernel can split long sequences.
        alone = self.max_seqlen_q == 1 and call.window is None
        window = (-1, -1) if alone else (-1 if call.window is None else call.window - 1, 0)
        here = self.on(query.device)
        attend = here._attend_pages if READS_PAGES else here._attend_sequences
        return attend(query.transpose(0, 1), keys, values, call.scale, window).transpose(0, 1)

    def on(self, device: torch.device) -> FlashPlan:
        """The plan on a layer's device, since a body may be spread over several."""
        if device == self.block_table.device:
            return self
        if device not in self._elsewhere:
            tables = {name: getattr(self, name).to(device, non_blocking=True) for name in TABLES}
            self._elsewhere[device] = replace(self, **tables)
        return self._elsewhere[device]

    def _attend_pages(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: tuple[int, int]
    ) -> torch.Tensor:
        output = varlen_attn(
            query,
            keys,
            values,
            self.cu_seqlens_q,
            None,
            self.max_seqlen_q,
            self.max_seqlen_k,
            scale=scale,
            window_size=window,
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.seqused_k,
            block_table=self.block_table,
        )
        assert isinstance(output, torch.Tensor)
        return output

    def _attend_sequences(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: tuple[int, int]
    ) -> torch.Tensor:
        if self.block_table.ndim == 1:
            keys, values = keys[self.block_table], values[self.block_table]
        output, *_ = flash_attention_forward(
            query,
            keys.view(-1, *keys.shape[-2:]),
            values.view(-1, *values.shape[-2:]),
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
            0.0,
            window == (-1, 0),
            False,
            scale=scale,
            window_size_left=window[0],
            window_size_right=window[1],
            seqused_k=self.seqused_k,
        )
        assert isinstance(output, torch.Tensor)
        return output
