"""Decoding batches as CUDA graphs: hundreds of kernels, launched at once.

A graph has fixed addresses and shapes, so there is one for each size of a batch and of its longest sequence, both
rounded up to a power of two, captured when it is first needed. Missing rows are padding; they write to a reserved
scratch page that no sequence owns.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from split_common.engine import flash
from split_common.engine.attention import PackedBatch, Span
from split_common.engine.flash import FlashPlan, make_tables
from split_common.engine.pool import PagePool

log = logging.getLogger(__name__)

#: Most sequences in a batch that is captured.
MAX_GRAPH_ROWS = 256

#: Alignment of the tensors in a buffer, in bytes.
ALIGNMENT = 16

#: Runs the layers over states `[tokens, width]`, positions `[1, tokens]` and a batch.
RunLayers = Callable[[torch.Tensor, torch.Tensor, PackedBatch], torch.Tensor]

#: Captures a computation over fixed tensors. Returns a function that repeats the computation.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


@functools.cache
def _capture_stream() -> Any:
    """The stream of warm-up runs, shared by all graphs: cuBLAS and others keep a workspace per stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def new_capture() -> Capture:
    """Returns a `Capture` whose CUDA graphs share memory, because they run one after the other.

    The next replay of any of them overwrites the output of a replay. A new `Capture` is needed after a failure, and
    when all its graphs have been dropped, because torch has freed their memory by then.
    """
    memory = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        current, warm_up = torch.cuda.current_stream(), _capture_stream()
        warm_up.wait_stream(current)
        try:
            with torch.cuda.stream(warm_up):
                # Libraries initialize themselves when they are first used, which cannot be captured.
                compute()
        finally:
            # The tensors that it reads may be freed only when it is done.
            current.wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile. If the capture fails, only the outer context restores the stream.
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


class GraphInputs:
    """All that a graph reads, in one buffer on the host and one on the device, so that one copy transfers it.

    Args:
        rows: sequences in the batch.
        pages: of the longest sequence in the batch.
        width, dtype: of the hidden states.
        device: the device of the graph.
    """

    def __init__(self, rows: int, pages: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shapes = {
            "slots": ((rows,), torch.long),
            "positions": ((1, rows), torch.long),
            "block_table": ((rows, pages), torch.int32),
            "seqused_k": ((rows,), torch.int32),
            "cu_seqlens_k": ((rows + 1,), torch.int32),
            "states": ((rows, width), dtype),
        }
        sizes = [-(-math.prod(shape) * kind.itemsize // ALIGNMENT) * ALIGNMENT for shape, kind in shapes.values()]
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

        #: Tensors by name: `written` are on the host, `read` are on the device.
        self.written, self.read = views(self._host), views(self._device)

    def writable(self) -> SimpleNamespace:
        """The tensors on the host, once their last copy to the device is done."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.written

    def copy(self) -> None:
        """Starts to copy the tensors on the host to the device."""
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))


@dataclass(frozen=True)
class GraphedModel:
    """What all graphs of one model share.

    Args:
        run_layers: runs the layers.
        pool: holds keys and values.
        width, dtype: of the hidden states.
        scratch: a page of the pool that no sequence owns.
    """

    run_layers: RunLayers
    pool: PagePool
    width: int
    dtype: torch.dtype
    scratch: int


class DecodeGraph:
    """One graph, and the tensors that it reads.

    Args:
        model: what the graph runs.
        capture: captures it.
        rows: sequences in the batch.
        pages: of the longest sequence in the batch.
    """

    def __init__(self, model: GraphedModel, capture: Capture, rows: int, pages: int) -> None:
        pool, width, dtype = model.pool, model.width, model.dtype
        device = next(iter(pool.layers.values()))[0].device
        self._scratch = model.scratch
        self._page_tokens = pool.page_tokens
        self._inputs = GraphInputs(rows, pages, width, dtype, device)
        self._write([], torch.empty(0, width), torch.empty(1, 0), torch.empty(0))
        read = self._inputs.read
        # Kept because the graph reads its tensors.
        self._plan = FlashPlan(
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32, device=device),
            cu_seqlens_k=read.cu_seqlens_k,
            seqused_k=read.seqused_k,
            block_table=read.block_table,
            max_seqlen_q=1,
            max_seqlen_k=pages * pool.page_tokens,
        )
        batch = PackedBatch(pool, [1] * rows, read.slots, self._plan)
        self._replay = capture(lambda: model.run_layers(read.states, read.positions, batch))

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
        inputs.slots.fill_(self._scratch * self._page_tokens)[:count] = slots
        rows, pages = inputs.block_table.shape
        targets = inputs.block_table, inputs.seqused_k, inputs.cu_seqlens_k
        for target, table in zip(targets, make_tables(spans, rows, pages, self._scratch), strict=True):
            target.copy_(table)
        self._inputs.copy()


class DecodeGraphs:
    """The graphs of one model over one pool, in which they reserve a scratch page.

    Args:
        run_layers: runs the layers.
        pool: holds keys and values.
        width, dtype: of the hidden states.
        new_capture: makes a `Capture` whose graphs share memory.
    """

    def __init__(
        self,
        run_layers: RunLayers,
        pool: PagePool,
        width: int,
        dtype: torch.dtype,
        new_capture: Callable[[], Capture],
    ) -> None:
        self._model = GraphedModel(run_layers, pool, width, dtype, pool.reserve())
        self._new_capture = new_capture
        self._capture = new_capture()
        #: Graphs by rows and pages; None for one that could not be captured.
        self._graphs: dict[tuple[int, int], DecodeGraph | None] = {}

    def run(
        self, spans: Sequence[Span], states: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor | None:
        """Runs a batch as a graph, which is captured first if need be.

        Args:
            spans: the batch, each of one token.
            states: `[rows, width]`. All tensors are on the host.
            positions: int64 `[1, rows]`.
            slots: int64 `[rows]`.

        Returns:
            The layers' output `[rows, width]`, which must be copied before the next call; None if there is no
            graph.
        """
        if len(spans) > MAX_GRAPH_ROWS or not flash.reads_in_place(spans):
            return None
        key = _next_power(len(spans)), _next_power(max(len(span.sequence.pages) for span in spans))
        if key not in self._graphs:
            self._graphs[key] = self._captured(*key)
        graph = self._graphs[key]
        return graph.run(spans, states, positions, slots) if graph is not None else None

    def _captured(self, rows: int, pages: int) -> DecodeGraph | None:
        try:
            return DecodeGraph(self._model, self._capture, rows=rows, pages=pages)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            log.warning("batches of %d rows and %d pages run without a CUDA graph: %s", rows, pages, reason)
            if isinstance(error, torch.OutOfMemoryError):
                self._graphs.clear()
            # Later graphs must not share memory with the one that failed.
            self._capture = self._new_capture()
            return None


def _next_power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
