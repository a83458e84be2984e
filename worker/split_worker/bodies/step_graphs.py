"""A denoiser's forwards as CUDA graphs: thousands of kernels, launched at once.

A graph has fixed addresses, shapes and Python numbers. So there is one for each common combination of shapes and
scales, and the tensors of each step are copied to the addresses that its graph reads.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from split_common.engine.graphs import Capture
from split_common.models.denoisers.spec import StepConditioning

log = logging.getLogger(__name__)

#: The forward of a combination that is captured, counted from 1. Capturing takes as long as two forwards.
CAPTURED = 3

#: Most graphs that are kept; the least recently used one is dropped first.
MAX_GRAPHS = 8

#: Forwards of a combination before its graph, once dropped, is captured again. If there are more combinations than
#: graphs, capturing them in turn would cost more than it gains.
CAPTURED_AGAIN = 50

#: Most bytes of a step and its conditioning that a graph reads. Larger steps keep a GPU busy without a graph.
MAX_GRAPH_BYTES = 128 * 1024**2

#: Most combinations without a graph that are counted.
MAX_COUNTED = 1024

_T = TypeVar("_T")

#: Computes a body's output from a step's tensors and their conditioning.
RunBlocks = Callable[[Sequence[torch.Tensor], StepConditioning], torch.Tensor]


class StepGraph:
    """One graph, and the tensors that it reads.

    Args:
        run_blocks: the computation to capture.
        capture: captures it.
        tensors, conditioning: of the first step. Later ones have the same shapes, strides, dtypes and scales.
    """

    def __init__(
        self,
        run_blocks: RunBlocks,
        capture: Capture,
        tensors: Sequence[torch.Tensor],
        conditioning: StepConditioning,
    ) -> None:
        own = [torch.empty_like(tensor) for tensor in tensors]
        own_conditioning = StepConditioning(
            tuple(torch.empty_like(tensor) for tensor in conditioning.tensors), conditioning.scales
        )
        self._inputs = [*own, *own_conditioning.tensors]
        self._write(tensors, conditioning)
        self._replay = capture(lambda: run_blocks(own, own_conditioning))

    def run(self, tensors: Sequence[torch.Tensor], conditioning: StepConditioning) -> torch.Tensor:
        self._write(tensors, conditioning)
        return self._replay()

    def _write(self, tensors: Sequence[torch.Tensor], conditioning: StepConditioning) -> None:
        for own, tensor in zip(self._inputs, (*tensors, *conditioning.tensors), strict=True):
            own.copy_(tensor)


class StepGraphs:
    """The graphs of one body.

    Args:
        run_blocks: runs the body. It is stateless, and depends on no Python values but shapes, strides and scales.
        new_capture: makes a `Capture` whose graphs share memory.
    """

    def __init__(self, run_blocks: RunBlocks, new_capture: Callable[[], Capture]) -> None:
        self._run_blocks, self._new_capture = run_blocks, new_capture
        self._capture: Capture
        self._graphs: OrderedDict[Hashable, StepGraph] = OrderedDict()
        #: How many forwards each combination without a graph has had; minus infinity if it cannot be captured.
        self._came: OrderedDict[Hashable, float] = OrderedDict()

    def run(self, tensors: Sequence[torch.Tensor], conditioning: StepConditioning) -> torch.Tensor:
        """The body's output. It must be copied, on the same stream, before the next call."""

        def compute() -> torch.Tensor:
            graph = self._graph(tensors, conditioning)
            return graph.run(tensors, conditioning) if graph else self._run_blocks(tensors, conditioning)

        return self.with_room(compute)

    def with_room(self, compute: Callable[[], _T]) -> _T:
        """Computes something. If memory runs out, frees the graphs and computes it again."""
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
            self._drop()
        return compute()

    def _graph(self, tensors: Sequence[torch.Tensor], conditioning: StepConditioning) -> StepGraph | None:
        """The graph for a step, which is captured when it is due; None if there is none."""
        if sum(tensor.nbytes for tensor in (*tensors, *conditioning.tensors)) > MAX_GRAPH_BYTES:
            return None
        key = _layouts(tensors), _layouts(conditioning.tensors), conditioning.scales
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        came = self._came.pop(key, 0) + 1
        if came == CAPTURED:
            try:
                if not self._graphs:
                    self._capture = self._new_capture()
                self._graphs[key] = StepGraph(self._run_blocks, self._capture, tensors, conditioning)
            except RuntimeError as error:
                log.warning("steps of one shape run without a CUDA graph: %s", " ".join(str(error).split())[:200])
                came = -math.inf
                # Later graphs must not share memory with the one that failed.
                self._capture = self._new_capture()
                if isinstance(error, torch.OutOfMemoryError):
                    self._drop()
            else:
                if len(self._graphs) > MAX_GRAPHS:
                    evicted, _ = self._graphs.popitem(last=False)
                    self._came[evicted] = CAPTURED - CAPTURED_AGAIN
                return self._graphs[key]
        self._came[key] = came
        if len(self._came) > MAX_COUNTED:
            self._came.popitem(last=False)
        return None

    def _drop(self) -> None:
        if self._graphs:
            log.warning("%d CUDA graphs are dropped to free memory", len(self._graphs))
        self._graphs.clear()


def _layouts(tensors: Sequence[torch.Tensor]) -> Hashable:
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
