"""A denoiser's forwards as CUDA graphs: thousands of kernels, launched at once.

A graph has fixed addresses, shapes and Python numbers. So there is one for each common combination of shapes and
numbers, and the tensors of each step are copied to where its graph reads them.
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

#: Which forward of a combination is captured. Capturing takes as long as two forwards, and an image has many steps.
CAPTURED = 3

#: Graphs that are kept; the least recently used one is dropped first.
MAX_GRAPHS = 8

#: Forwards of a combination before its graph, once dropped, is captured again. With more combinations than graphs,
#: capturing them in turn would cost more than it gains.
CAPTURED_AGAIN = 50

#: Bytes of steps and jobs that a graph reads, at most. Larger steps keep a GPU busy without a graph.
MAX_BYTES = 128 * 1024**2

#: Combinations without a graph that are counted, at most.
MAX_COUNTED = 1024

_T = TypeVar("_T")

#: Computes a body's output from a step's tensors and a job.
RunBlocks = Callable[[Sequence[torch.Tensor], StepConditioning], torch.Tensor]


class StepGraph:
    """One graph, and what it reads.

    Args:
        tensors, job: the first step's; all later ones have the same shapes, layouts, dtypes and scales.
    """

    def __init__(
        self, run_blocks: RunBlocks, capture: Capture, tensors: Sequence[torch.Tensor], job: StepConditioning
    ) -> None:
        own = [torch.empty_like(tensor) for tensor in tensors]
        own_job = StepConditioning(tuple(torch.empty_like(tensor) for tensor in job.tensors), job.scales)
        self._inputs = [*own, *own_job.tensors]
        self._write(tensors, job)
        self._replay = capture(lambda: run_blocks(own, own_job))

    def run(self, tensors: Sequence[torch.Tensor], job: StepConditioning) -> torch.Tensor:
        self._write(tensors, job)
        return self._replay()

    def _write(self, tensors: Sequence[torch.Tensor], job: StepConditioning) -> None:
        for own, tensor in zip(self._inputs, (*tensors, *job.tensors), strict=True):
            own.copy_(tensor)


class StepGraphs:
    """The graphs of one body.

    Args:
        run_blocks: runs the body. It keeps nothing, and depends on no Python value but shapes, layouts and scales.
        new_capture: makes a `Capture` whose graphs share memory.
    """

    def __init__(self, run_blocks: RunBlocks, new_capture: Callable[[], Capture]) -> None:
        self._run_blocks, self._new_capture = run_blocks, new_capture
        self._capture: Capture
        self._graphs: OrderedDict[Hashable, StepGraph] = OrderedDict()
        #: How often each combination without a graph came; minus infinity if it cannot be captured.
        self._came: OrderedDict[Hashable, float] = OrderedDict()

    def run(self, tensors: Sequence[torch.Tensor], job: StepConditioning) -> torch.Tensor:
        """The body's output, to be copied, on the same stream, before the next call."""

        def compute() -> torch.Tensor:
            graph = self._graph(tensors, job)
            return graph.run(tensors, job) if graph else self._run_blocks(tensors, job)

        return self.with_room(compute)

    def with_room(self, compute: Callable[[], _T]) -> _T:
        """Computes something; if memory runs out, again without the graphs, which give theirs back."""
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
            self._drop()
        return compute()

    def _graph(self, tensors: Sequence[torch.Tensor], job: StepConditioning) -> StepGraph | None:
        """The graph for a step, captured if it is time to; None if there is none."""
        if sum(tensor.nbytes for tensor in (*tensors, *job.tensors)) > MAX_BYTES:
            return None
        key = _kinds(tensors), _kinds(job.tensors), job.scales
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        came = self._came.pop(key, 0) + 1
        if came == CAPTURED:
            try:
                if not self._graphs:
                    self._capture = self._new_capture()
                self._graphs[key] = StepGraph(self._run_blocks, self._capture, tensors, job)
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
            log.warning("the memory of %d CUDA graphs is given back", len(self._graphs))
        self._graphs.clear()


def _kinds(tensors: Sequence[torch.Tensor]) -> Hashable:
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
