"""Decoding batches as CUDA graphs: hundreds of kernels, launched at once.

A graph has fixed addresses and shapes, so there is one for each size of a batch and of its longest sequence, both
rounded up to a power of two, captured when it is first needed. What a batch lacks is filled up with rows that write
into a page of nobody's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from split_common.engine.attention import PackedBatch, Span
from split_common.engine.flash import FlashPlan
from split_common.engine.pool import PagePool

log = logging.getLogger(__name__)

#: Largest batch that is captured.
MAX_ROWS = 256

#: Runs the layers over states `[tokens, width]`, positions `[1, tokens]` and a batch.
Forward = Callable[[torch.Tensor, torch.Tensor, PackedBatch], torch.Tensor]

#: Makes something that can be repeated of a computation over fixed tensors.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


@functools.cache
def _memory() -> Any:
    """What all graphs take their memory from: they run one after the other."""
    return torch.cuda.graph_pool_handle()


def capture_cuda(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Captures a computation in a CUDA graph; what it returns is overwritten by any other graph's replay."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        # Libraries set themselves up when they are first used, which cannot be captured.
        compute()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_memory()):
        output = compute()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


class DecodeGraph:
    """One graph, and the tensors that it reads.

    Args:
        blank: a page whose contents nobody reads.
        rows, pages: of the batch, and of the longest sequence in it.
    """

    def __init__(
        self,
        forward: Forward,
        pool: PagePool,
        width: int,
        dtype: torch.dtype,
        capture: Capture,
        blank: int,
        rows: int,
        pages: int,
    ) -> None:
        device = next(iter(pool.layers.values()))[0].device
        self._blank = blank
        self._page_tokens = pool.page_tokens
        self._states = torch.zeros(rows, width, dtype=dtype, device=device)
        self._positions = torch.zeros(1, rows, dtype=torch.long, device=device)
        self._slots = torch.full((rows,), blank * pool.page_tokens, dtype=torch.long, device=device)
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        table = torch.full((rows, pages), blank, dtype=torch.int32, device=device)
        lengths = torch.ones(rows, dtype=torch.int32, device=device)
        self._plan = FlashPlan(ends, table, lengths, 1, pages * pool.page_tokens)
        batch = PackedBatch(pool, [1] * rows, self._slots, self._plan)
        self._replay = capture(lambda: forward(self._states, self._positions, batch))

    def run(
        self, spans: Sequence[Span], states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        rows, pages = self._plan.table.shape
        count = len(spans)
        table = np.full((rows, pages), self._blank, dtype=np.int32)
        lengths = np.ones(rows, dtype=np.int32)
        for row, span in enumerate(spans):
            table[row, : len(span.sequence.pages)] = span.sequence.pages
            lengths[row] = span.sequence.length
        _fill(self._plan.table, torch.from_numpy(table))
        _fill(self._plan.lengths, torch.from_numpy(lengths))
        _fill(self._slots[:count], slots)
        self._slots[count:] = self._blank * self._page_tokens
        _fill(self._states[:count], states)
        _fill(self._positions[:, :count], positions)
        return self._replay()[:count]


class DecodeGraphs:
    """The graphs of one model over one pool, of which they take a page.

    Args:
        forward: runs the layers.
        pool: the keys and values.
        width, dtype: of the hidden states.
        capture: makes a graph.
    """

    def __init__(self, forward: Forward, pool: PagePool, width: int, dtype: torch.dtype, capture: Capture) -> None:
        self._make = partial(DecodeGraph, forward, pool, width, dtype, capture, pool.reserve())
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._works = True

    def run(
        self, spans: Sequence[Span], states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor | None:
        """The layers' output `[rows, width]`, to be copied before the next call; None if no graph does it.

        Args:
            spans: the batch, each of one token.
            states: `[rows, width]`; positions: `[1, rows]`; slots: `[rows]`; all on the host.
        """
        if len(spans) > MAX_ROWS or not self._works:
            return None
        key = _power(len(spans)), _power(max(len(span.sequence.pages) for span in spans))
        if key not in self._graphs:
            try:
                self._graphs[key] = self._make(*key)
            except RuntimeError as error:
                log.warning("decoding runs without CUDA graphs: %s", error)
                self._works = False
                return None
        return self._graphs[key].run(spans, states, positions, slots)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _fill(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
