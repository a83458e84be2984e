"""Decoding batches as CUDA graphs: hundreds of kernels, launched at once.

A graph has fixed addresses and shapes, so there is one for each size of a batch and of its longest sequence, both
rounded up to a power of two, captured when it is first needed. What a batch lacks is filled up with rows that write
into a page of nobody's.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from split_common.engine import flash
from split_common.engine.attention import PackedBatch, Span
from split_common.engine.flash import FlashPlan, make_tables
from split_common.engine.pool import PagePool

log = logging.getLogger(__name__)

#: Largest batch that is captured.
MAX_ROWS = 256

#: Bytes that the tensors of a buffer begin at multiples of.
ALIGNED = 16

#: Runs the layers over states `[tokens, width]`, positions `[1, tokens]` and a batch.
Forward = Callable[[torch.Tensor, torch.Tensor, PackedBatch], torch.Tensor]

#: Makes something that can be repeated of a computation over fixed tensors.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


@functools.cache
def _beside() -> Any:
    """A stream. There is one: libraries keep memory for each that they have seen."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def new_capture() -> Capture:
    """Captures computations in CUDA graphs that share memory, since they run one after the other.

    What a replay returns is overwritten by that of any other of them. A new one is needed after a failure, and
    when none of its graphs is left: torch has taken their memory back by then.
    """
    memory = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        current, beside = torch.cuda.current_stream(), _beside()
        beside.wait_stream(current)
        try:
            with torch.cuda.stream(beside):
                # Libraries set themselves up when they are first used, which cannot be captured.
                compute()
        finally:
            # What it reads may be freed now.
            current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile. The stream is set back here too: torch does not if a capture fails.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"),
        ):
            output = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    return capture


class Inputs:
    """All that a graph reads, in one buffer on the host and one on the device: one copy brings it there.

    Args:
        rows, pages: of the batch, and of the longest sequence in it.
        width, dtype: of the hidden states.
    """

    def __init__(self, rows: int, pages: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shapes = {
            "slots": ((rows,), torch.long),
            "positions": ((1, rows), torch.long),
            "table": ((rows, pages), torch.int32),
            "lengths": ((rows,), torch.int32),
            "begins": ((rows + 1,), torch.int32),
            "states": ((rows, width), dtype),
        }
        sizes = [-(-math.prod(shape) * kind.itemsize // ALIGNED) * ALIGNED for shape, kind in shapes.values()]
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

        def views(buffer: torch.Tensor) -> SimpleNamespace:
            parts = zip(shapes.items(), torch.split(buffer, sizes), strict=True)
            return SimpleNamespace(
                **{
                    name: part[: math.prod(shape) * kind.itemsize].view(kind).view(shape)
                    for (name, (shape, kind)), part in parts
                }
            )

        #: Tensors by name: those that are written, on the host, and those that the graph reads.
        self.written, self.read = views(self._host), views(self._device)

    def writable(self) -> SimpleNamespace:
        """Those on the host, once they are on the device as they were."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.written

    def copy(self) -> None:
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))


class DecodeGraph:
    """One graph, and what it reads.

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
        self._inputs = Inputs(rows, pages, width, dtype, device)
        self._write([], torch.empty(0, width), torch.empty(1, 0), torch.empty(0))
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        read = self._inputs.read
        #: The graph reads what it holds.
        self._plan = FlashPlan(ends, read.table, read.lengths, read.begins, 1, pages * pool.page_tokens)
        batch = PackedBatch(pool, [1] * rows, read.slots, self._plan)
        self._replay = capture(lambda: forward(read.states, read.positions, batch))

    def run(
        self, spans: Sequence[Span], states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        self._write(spans, states, positions, slots)
        return self._replay()[: len(spans)]

    def _write(
        self, spans: Sequence[Span], states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> None:
        count = len(spans)
        inputs = self._inputs.writable()
        inputs.states[:count] = states
        inputs.positions[:, :count] = positions
        inputs.slots.fill_(self._blank * self._page_tokens)[:count] = slots
        rows, pages = inputs.table.shape
        for target, table in zip(
            (inputs.table, inputs.lengths, inputs.begins), make_tables(spans, rows, pages, self._blank), strict=True
        ):
            target.copy_(table)
        self._inputs.copy()


class DecodeGraphs:
    """The graphs of one model over one pool, of which they take a page.

    Args:
        forward: runs the layers.
        pool: the keys and values.
        width, dtype: of the hidden states.
        new_capture: makes what captures graphs that share memory.
    """

    def __init__(
        self,
        forward: Forward,
        pool: PagePool,
        width: int,
        dtype: torch.dtype,
        new_capture: Callable[[], Capture],
    ) -> None:
        self._make = partial(DecodeGraph, forward, pool, width, dtype, blank=pool.reserve())
        self._new_capture = new_capture
        self._capture = new_capture()
        #: By the sizes of the batch and of its longest sequence; None where it could not be captured.
        self._graphs: dict[tuple[int, int], DecodeGraph | None] = {}

    def run(
        self, spans: Sequence[Span], states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor | None:
        """The layers' output `[rows, width]`, to be copied before the next call; None if no graph does it.

        Args:
            spans: the batch, each of one token.
            states: `[rows, width]`; positions: `[1, rows]`; slots: `[rows]`; all on the host.
        """
        if len(spans) > MAX_ROWS or not flash.reads_in_place(spans):
            return None
        key = _power(len(spans)), _power(max(len(span.sequence.pages) for span in spans))
        if key not in self._graphs:
            self._graphs[key] = self._captured(*key)
        graph = self._graphs[key]
        return graph.run(spans, states, positions, slots) if graph is not None else None

    def _captured(self, rows: int, pages: int) -> DecodeGraph | None:
        try:
            return self._make(capture=self._capture, rows=rows, pages=pages)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            log.warning("batches of %d rows and %d pages run without a CUDA graph: %s", rows, pages, reason)
            if isinstance(error, torch.OutOfMemoryError):
                self._graphs.clear()
            # Those to come share no memory with what failed.
            self._capture = self._new_capture()
            return None


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
