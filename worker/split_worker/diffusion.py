"""The body of a diffusion model's denoiser, as the compute loop runs it: steps of one shape share a forward."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch

from split_common import payloads
from split_common.diffusion.codecs import decode, encode
from split_common.diffusion.plan import ImagePlan, Job
from split_common.engine.graphs import new_capture
from split_common.engine.rows import Row, Run
from split_common.engine.runner import Launched
from split_common.errors import Malformed, ModelError, NeedEmbeddings, Oversized
from split_common.split import Split
from split_common.tensors import DTYPES
from split_worker.step_graphs import Forward, StepGraphs

#: Bytes that are held for image jobs unless told otherwise: embeddings, and steps and outputs that travel in parts.
#: Those that were used least lately give way.
MEMORY = 1024**3

#: Embeddings, steps and outputs that are held, at most: small ones take more than their bytes.
MAX_HELD = 8192

#: Rows in one forward, at most; a step with more has one of its own.
MAX_BATCH_ROWS = 16

#: Bytes of the embeddings of one step's rows, at most.
MAX_CONTEXT = 256 * 1024**2

#: Seconds that the first forward may take: a large image on a CPU.
FIRST_TURN = 900.0

#: Sessions are admitted by their number: they keep nothing that may not be forgotten.
UNBOUNDED = sys.maxsize

#: What is held of a session beside its jobs: the parts of a step so far, and an output that is sent in parts.
_PARTS, _OUTPUT = b"parts", b"output"


_T = TypeVar("_T")


@dataclass(eq=False)
class ConditionRow:
    """All that a session of image jobs has: its place in the store."""

    store: ConditionStore
    length: int = 0

    def truncate(self, tokens: int) -> None:
        """A step leaves nothing behind."""

    def fork(self) -> ConditionRow:
        return ConditionRow(self.store)

    def free(self) -> None:
        self.store.forget(self)


class ConditionStore:
    """What is held for image jobs, by session and key. Used by the thread that computes."""

    #: A step needs no room here.
    free = free_tokens = capacity = UNBOUNDED

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._held: OrderedDict[tuple[ConditionRow, bytes], Job | bytearray | bytes] = OrderedDict()
        #: Bytes that are held.
        self.used = 0

    def new_row(self) -> ConditionRow:
        return ConditionRow(self)

    def cost(self, row: Row, tokens: int) -> int:
        return 0

    def put(self, row: ConditionRow, key: bytes, held: Job | bytearray | bytes) -> None:
        self._take(row, key)
        self._held[row, key] = held
        self.used += _size(held)
        while len(self._held) > MAX_HELD or (len(self._held) > 1 and self.used > self._memory):
            self._take(*next(iter(self._held)))

    def _take(self, row: ConditionRow, key: bytes) -> Job | bytearray | bytes | None:
        """Takes out what is held, if anything is."""
        held = self._held.pop((row, key), None)
        if held is not None:
            self.used -= _size(held)
        return held

    def job(self, row: ConditionRow, key: bytes) -> Job:
        """Raises NeedEmbeddings."""
        held = self._held.get((row, key))
        if not isinstance(held, Job):
            raise NeedEmbeddings("the worker does not hold the embeddings of this image")
        self._held.move_to_end((row, key))
        return held

    def extend(self, row: ConditionRow, offset: int, data: memoryview) -> None:
        """Takes bytes of a step that follow those that are held. Raises NeedEmbeddings, Oversized."""
        held = self._take(row, _PARTS) if offset else None
        held = held if isinstance(held, bytearray) else bytearray()
        if len(held) != offset:
            raise NeedEmbeddings("the worker does not hold the parts of this step that came before")
        if offset + len(data) > payloads.MAX_STEP:
            raise Oversized(f"a step of more than {payloads.MAX_STEP} bytes")
        held += data
        self.put(row, _PARTS, held)

    def whole(self, row: ConditionRow, sent: int, data: memoryview) -> memoryview:
        """The bytes of a step, whose first ones came before. Raises NeedEmbeddings."""
        held = self._take(row, _PARTS)
        self._take(row, _OUTPUT)
        if not sent:
            return data
        if not isinstance(held, bytearray) or len(held) != sent:
            raise NeedEmbeddings("the worker does not hold the parts of this step that came before")
        held += data
        return memoryview(held)

    def output(self, row: ConditionRow, offset: int, size: int) -> bytes:
        """Some bytes of the last step's output. Raises NeedEmbeddings, Malformed."""
        held = self._held.get((row, _OUTPUT))
        if not isinstance(held, bytes):
            raise NeedEmbeddings("the worker does not hold the output of this step")
        if offset + size > len(held):
            raise Malformed(f"an output of {len(held)} bytes has none up to {offset + size}")
        return held[offset : offset + size]

    def forget(self, row: ConditionRow) -> None:
        for place in [place for place in self._held if place[0] is row]:
            self._take(*place)


def _size(held: Job | bytearray | bytes) -> int:
    return held.nbytes if isinstance(held, Job) else len(held)


@dataclass(frozen=True)
class ImageRun(Run):
    """A step's inputs, as `Middle` takes them; `states` is the first. Its positions count for its size only."""

    more: list[torch.Tensor]
    job: Job
    #: Which of the job's rows belongs to each of the step's; -1 for zeros.
    rows: list[int]
    #: Steps that agree in this can share a forward.
    group: Hashable

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.states, *self.more]


class LaunchedImages(Launched):
    """Forwards of several shapes that were started together: the runs of each, and its output."""

    def __init__(self, forwards: list[tuple[Sequence[int], Launched]]) -> None:
        self._forwards = forwards

    def wait(self) -> list[torch.Tensor]:
        outputs = {
            index: output
            for indices, launched in self._forwards
            for index, output in zip(indices, launched.wait(), strict=True)
        }
        return [outputs[index] for index in sorted(outputs)]


class DiffusionBody:
    """A loaded body of a denoiser, in the place of a language model's `Body`.

    Args:
        plan: the denoiser.
        split: the body's blocks.
        device: where it runs.
        dtype: what it computes in; None takes the checkpoint's.
        memory: bytes of embeddings to hold; None for the default.

    Raises:
        ModelError: the body cannot be loaded.
    """

    #: No hidden states of a language model fit.
    width = 0
    positions_interact = False
    first_turn = FIRST_TURN

    def __init__(
        self,
        plan: ImagePlan,
        split: Split,
        device: torch.device,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
    ) -> None:
        self._plan, self._split = plan, split
        middle = plan.middle(split, dtype)
        try:
            self._middle = middle.to(device)
        except torch.OutOfMemoryError:
            raise ModelError(
                f"the body of {plan.checkpoint.name} does not fit on the GPU: use --cut A, --dtype bfloat16 or "
                "--device cpu"
            ) from None
        parameter = next(self._middle.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.asynchronous = self.device.type == "cuda"
        self._graphs = StepGraphs(self._middle, new_capture) if self.asynchronous else None
        #: Where answers are computed while the next forward runs.
        self._beside = torch.cuda.Stream(self.device, -1) if self.asynchronous else None  # type: ignore[no-untyped-call]
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in self._middle.parameters())
        self.store = ConditionStore(MEMORY if memory is None else memory)

    def start(self, rows: list[Row], request: payloads.Payload, data: memoryview) -> list[Run]:
        """Takes a request of a session with these rows: the runs of a step, none for anything else.

        Raises:
            NeedEmbeddings: they are not held (any more).
            Malformed, Oversized, NonFinite: the tensors do not fit the body, or each other.
        """
        if not rows:
            rows.append(self.store.new_row())
        row = rows[0]
        assert isinstance(row, ConditionRow)
        match request:
            case payloads.Condition():
                self._condition(row, request, data)
                return []
            case payloads.Denoise():
                return [self._run(row, request, data)]
            case payloads.TensorPart():
                self.store.extend(row, request.offset, data)
                return []
            case payloads.PartRequest():
                return []
        raise Malformed(f"a {type(request).__name__} for an image model")

    def answer(
        self, rows: list[Row], request: payloads.Payload, output: torch.Tensor
    ) -> tuple[payloads.Payload, memoryview | bytes]:
        """What a request is answered with, given the output of its runs. Raises NonFinite, NeedEmbeddings."""
        row = rows[0]
        assert isinstance(row, ConditionRow)
        match request:
            case payloads.Denoise():
                array, data = self._encode(output, request.codec)
                if array.nbytes > payloads.PART_BYTES:
                    self.store.put(row, _OUTPUT, bytes(data))
                return payloads.Denoised(array), memoryview(data)[: payloads.PART_BYTES]
            case payloads.PartRequest():
                part = self.store.output(row, request.offset, request.size)
                return payloads.TensorPart(request.offset, request.size), part
        return payloads.Done(), b""

    def launch(self, runs: Sequence[Run]) -> LaunchedImages:
        """Starts a forward for each group of steps of one shape."""
        groups: dict[Hashable, list[list[int]]] = {}
        images = [run for run in runs if isinstance(run, ImageRun)]
        for index, run in enumerate(images):
            batches = groups.setdefault(run.group, [[]])
            if batches[-1] and sum(len(images[i].states) for i in [*batches[-1], index]) > MAX_BATCH_ROWS:
                batches.append([])
            batches[-1].append(index)
        with torch.inference_mode():
            return LaunchedImages(
                [
                    (batch, self._forward([images[index] for index in batch]))
                    for batches in groups.values()
                    for batch in batches
                ]
            )

    def _forward(self, runs: Sequence[ImageRun]) -> Launched:
        job = runs[0].job
        if self._middle.per_row:
            # Selected only now: a step of many rows may wait with a small job.
            selected = [[_rows(tensor, run.rows) for tensor in run.job.tensors] for run in runs]
            job = Job(_joined(selected), job.scales)
        compute: Forward = self._middle if self._graphs is None else self._graphs.run
        output = compute(_joined([run.tensors for run in runs]), job)
        return Launched(output, [len(run.states) for run in runs], range(len(runs)))

    def _encode(self, output: torch.Tensor, codec: payloads.Codec) -> tuple[payloads.Array, bytes | memoryview]:
        """An output of the host as it travels; what takes long is done on the GPU. Raises NonFinite."""
        if self._beside is None or codec in DTYPES:
            return encode(output, codec)
        with torch.cuda.stream(self._beside):
            return self._with_room(lambda: encode(output.to(self.device, non_blocking=True), codec))

    def _with_room(self, compute: Callable[[], _T]) -> _T:
        return compute() if self._graphs is None else self._graphs.with_room(compute)

    def _condition(self, row: ConditionRow, request: payloads.Condition, data: memoryview) -> None:
        self._middle.check_job([array.shape for array in request.arrays], len(request.scales))
        if not all(map(math.isfinite, request.scales)):
            raise Malformed("scales of a job that are not finite")
        self.store.put(row, request.key, Job(tuple(self._decode(request.arrays, data)), tuple(request.scales)))

    def _run(self, row: ConditionRow, request: payloads.Denoise, data: memoryview) -> ImageRun:
        shapes = [array.shape for array in request.arrays]
        self._check(request, shapes)
        data = self.store.whole(row, request.sent, data)
        tensors = self._decode(request.arrays, data)
        job = self.store.job(row, request.condition) if request.condition is not None else Job()
        self._middle.check_step(shapes, job)
        if self._middle.per_row:
            self._check_rows(job, request.rows)
        states, *more = tensors
        shapes_of_rows = tuple(tensor.shape[1:] for tensor in tensors)
        group = shapes_of_rows, states.is_contiguous(), self._middle.together(job)
        return ImageRun(row, states, range(states.numel()), more, job, request.rows, group)

    def _decode(self, arrays: list[payloads.Array], data: memoryview) -> list[torch.Tensor]:
        def decoded() -> list[torch.Tensor]:
            parts = zip(arrays, accumulate((array.nbytes for array in arrays), initial=0), strict=False)
            return [
                decode(array, data[begin : begin + array.nbytes], self.device).to(self.dtype)
                for array, begin in parts
            ]

        return self._with_room(decoded)

    def _check(self, request: payloads.Denoise, shapes: list[list[int]]) -> None:
        """Raises Malformed or Oversized for shapes that are not the body's."""
        wanted = self._plan.step_shapes(self._split, shapes)
        if shapes != wanted:
            wrong = next((pair for pair in zip(shapes, wanted, strict=False) if pair[0] != pair[1]), None)
            detail = f"{wrong[0]}, not {wrong[1]}" if wrong else f"{len(shapes)} tensors, not {len(wanted)}"
            raise Malformed(f"a step of an image does not fit the model: {detail}")
        if len(request.rows) != shapes[0][0]:
            raise Malformed(f"a step of {shapes[0][0]} rows that names {len(request.rows)}")
        output = payloads.Array(request.codec, self._plan.output_shape(self._split, shapes))
        if request.sent > request.step_bytes:
            raise Malformed(f"a step of {request.step_bytes} bytes, of which {request.sent} came before")
        if max(request.step_bytes, output.nbytes) > payloads.MAX_STEP:
            raise Oversized(f"a step of {request.step_bytes} bytes whose answer has {output.nbytes}")

    @staticmethod
    def _check_rows(job: Job, rows: list[int]) -> None:
        """Raises Malformed for a row that the job does not have, Oversized when they are too large together."""
        if any(max(rows) >= len(tensor) for tensor in job.tensors):
            raise Malformed(f"a step names row {max(rows)}, which its job does not have")
        if (size := len(rows) * sum(tensor[0].nbytes for tensor in job.tensors)) > MAX_CONTEXT:
            raise Oversized(f"{len(rows)} rows of embeddings with {size} bytes")


def _rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows of a tensor; zeros for -1."""
    if rows == list(range(len(tensor))):
        return tensor
    zeros = torch.zeros_like(tensor[:1])
    return torch.cat([tensor[row : row + 1] if row >= 0 else zeros for row in rows])


def _joined(groups: Sequence[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*groups, strict=True))
