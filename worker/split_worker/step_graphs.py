"""A denoiser's forwards as CUDA graphs: thousands of kernels, launched at once.

A graph has fixed addresses, shapes and numbers of Python's. So there is one for each combination of them that keeps
coming, and what changes from step to step is copied to where the graph reads it.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from split_common.diffusion.plan import Job
from split_common.engine.graphs import Capture

log = logging.getLogger(__name__)

#: Which forward of a combination is captured: that takes as long as two, and an image has many steps.
CAPTURED = 3

#: Graphs that are kept; the one that was used least lately gives way, and is captured again only after so many
#: forwards: where there are more combinations than graphs, capturing them in turn would cost more than it gives.
MAX_GRAPHS = 8
AGAIN = 50

#: Bytes that a graph reads of steps and jobs, at most. Larger steps keep a GPU busy without one.
MAX_BYTES = 128 * 1024**2

#: Combinations without a graph that are counted, at most.
MAX_COUNTED = 1024

_T = TypeVar("_T")

#: A body's output for a step's tensors and a job.
Forward = Callable[[Sequence[torch.Tensor], Job], torch.Tensor]


class StepGraph:
    """One graph, and what it reads.

    Args:
        tensors, job: what it is first run with; all others have the same shapes, layouts, dtypes and scales.
    """

    def __init__(self, forward: Forward, capture: Capture, tensors: Sequence[torch.Tensor], job: Job) -> None:
        own = [torch.empty_like(tensor) for tensor in tensors]
        own_job = Job(tuple(torch.empty_like(tensor) for tensor in job.tensors), job.scales)
        self._inputs = [*own, *own_job.tensors]
        self._write(tensors, job)
        self._replay = capture(lambda: forward(own, own_job))

    def run(self, tensors: Sequence[torch.Tensor], job: Job) -> torch.Tensor:
        self._write(tensors, job)
        return self._replay()

    def _write(self, tensors: Sequence[torch.Tensor], job: Job) -> None:
        for own, tensor in zip(self._inputs, (*tensors, *job.tensors), strict=True):
            own.copy_(tensor)


class StepGraphs:
    """The graphs of one body.

    Args:
        forward: runs the body. It keeps nothing, and reads nothing of Python's but shapes, layouts and scales.
        new_capture: makes what captures graphs that share memory.
    """

    def __init__(self, forward: Forward, new_capture: Callable[[], Capture]) -> None:
        self._forward, self._new_capture = forward, new_capture
        self._capture: Capture
        self._graphs: OrderedDict[Hashable, StepGraph] = OrderedDict()
        #: How often a combination came that has no graph; minus infinity where it cannot have one.
        self._came: OrderedDict[Hashable, float] = OrderedDict()

    def run(self, tensors: Sequence[torch.Tensor], job: Job) -> torch.Tensor:
        """The body's output, to be copied, on the same stream, before the next call."""

        def compute() -> torch.Tensor:
            graph = self._graph(tensors, job)
            return graph.run(tensors, job) if graph else self._forward(tensors, job)

        return self.with_room(compute)

    def with_room(self, compute: Callable[[], _T]) -> _T:
        """Does something for which the graphs give their memory back if there is too little."""
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
            self._drop()
        return compute()

    def _graph(self, tensors: Sequence[torch.Tensor], job: Job) -> StepGraph | None:
        """Captures it if need be."""
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
                self._graphs[key] = StepGraph(self._forward, self._capture, tensors, job)
            except RuntimeError as error:
                log.warning("steps of one shape run without a CUDA graph: %s", " ".join(str(error).split())[:200])
                came = -math.inf
                # Those to come share no memory with what failed.
                self._capture = self._new_capture()
                if isinstance(error, torch.OutOfMemoryError):
                    self._drop()
            else:
                if len(self._graphs) > MAX_GRAPHS:
                    evicted, _ = self._graphs.popitem(last=False)
                    self._came[evicted] = CAPTURED - AGAIN
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
