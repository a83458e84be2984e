"""The body of a diffusion model's denoiser: steps are independent, and steps of one shape share a forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch

from split_common.engine.forward import Forward
from split_common.engine.graphs import new_capture
from split_common.engine.sequences import Run
from split_common.errors import Malformed, ModelError, Oversized
from split_common.models.denoisers.codecs import decode, encode
from split_common.models.denoisers.spec import DenoiserSpec, StepConditioning
from split_common.models.split import Split
from split_common.models.tensors import DTYPES
from split_common.protocol import payloads
from split_common.protocol.capabilities import KEEP, TREES, UNPADDED
from split_worker.bodies.held import HELD_BYTES, OUTPUT, HeldArrays, ImageState
from split_worker.bodies.step_graphs import RunBlocks, StepGraphs

#: Most rows in one forward; a step with more has a forward of its own.
MAX_BATCH_ROWS = 16

#: Most bytes of embeddings for all rows of one step.
MAX_CONTEXT = 256 * 1024**2

#: Most bytes of a step's tensors, and of its answer, as the body computes them at most: in float32.
MAX_DECODED = payloads.MAX_STEP
FLOAT_BYTES = 4

#: Seconds for the first forward: a large image on a CPU takes long.
FIRST_DENOISE_TURN = 900.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class DenoiserRun(Run):
    """One step of an image."""

    #: The step's inputs, as `DenoiserBlocks` takes them. The first one holds the states.
    tensors: Sequence[torch.Tensor]
    conditioning: StepConditioning
    #: The row of the conditioning that belongs to each row of the step; -1 for zeros.
    rows: list[int]
    #: Steps with equal keys can share a forward.
    batch_key: Hashable

    @property
    def cost(self) -> int:
        return self.tensors[0].numel()


class GroupedForward:
    """Forwards of several shapes that were launched together (a `Forward`).

    Args:
        forwards: the indices of the runs in each forward, and the forward.
    """

    def __init__(self, forwards: list[tuple[Sequence[int], Forward]]) -> None:
        self._forwards = forwards

    def wait(self) -> list[torch.Tensor]:
        outputs = {
            index: output
            for indices, forward in self._forwards
            for index, output in zip(indices, forward.wait(), strict=True)
        }
        return [outputs[index] for index in sorted(outputs)]


class DenoiserBody:
    """The blocks between a denoiser's ends (a `Body`).

    Args:
        spec: the denoiser.
        split: the body's blocks.
        device: where it runs.
        dtype: what it computes in; None takes the checkpoint's.
        memory: bytes of embeddings and steps to hold; None for the default.
        max_pixels: most pixels of an image; None for the default.

    Raises:
        ModelError: the body cannot be loaded.
    """

    #: Steps leave no keys and values behind, so that only the number of sessions is limited.
    store = None
    #: A step of an image goes into one forward whole.
    divisible = False
    lacks = frozenset({KEEP, TREES, UNPADDED})
    first_turn = FIRST_DENOISE_TURN

    def __init__(
        self,
        spec: DenoiserSpec,
        split: Split,
        device: torch.device,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self._spec, self._split = spec, split
        self._max_pixels = max_pixels or spec.default_max_pixels
        blocks = spec.load_blocks(split, dtype)
        try:
            self._blocks = blocks.to(device)
        except torch.OutOfMemoryError:
            raise ModelError(
                f"the body of {spec.checkpoint.name} does not fit on the GPU: use --cut A, --dtype bfloat16 or "
                "--device cpu"
            ) from None
        parameter = next(self._blocks.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.asynchronous = self.device.type == "cuda"
        self._graphs = StepGraphs(self._blocks, new_capture) if self.asynchronous else None
        #: The CUDA stream on which outputs are quantized while the next forward runs.
        self._quantizing = torch.cuda.Stream(self.device, -1) if self.asynchronous else None  # type: ignore[no-untyped-call]
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in self._blocks.parameters())
        #: What is held for sessions.
        self.held = HeldArrays(HELD_BYTES if memory is None else memory)

    def new_state(self, member: str = "") -> ImageState:
        return ImageState(self.held, member)

    def begin(self, state: ImageState, request: payloads.AnyRequest, data: memoryview) -> list[DenoiserRun]:
        match request:
            case payloads.Conditioning():
                self._condition(state, request, data)
                return []
            case payloads.Denoise():
                return [self._run(state, request, data)]
            case payloads.TensorPart():
                self.held.extend(state, request.offset, data)
                return []
            case payloads.PartRequest():
                return []
        raise Malformed(f"a {type(request).__name__} for an image model")

    def reply(
        self, state: ImageState, request: payloads.AnyRequest, output: torch.Tensor
    ) -> tuple[payloads.AnyReply, memoryview | bytes]:
        match request:
            case payloads.Denoise():
                array, data = self._encode(output, request.codec)
                if array.nbytes > payloads.PART_BYTES:
                    self.held.put(state, OUTPUT, bytes(data))
                return payloads.Denoised(array), memoryview(data)[: payloads.PART_BYTES]
            case payloads.PartRequest():
                part = self.held.output(state, request.offset, request.size)
                return payloads.TensorPart(request.offset, request.size), part
        return payloads.Done(), b""

    def launch(self, runs: Sequence[DenoiserRun]) -> GroupedForward:
        """Starts a forward for each group of steps of one shape."""
        groups: dict[Hashable, list[list[int]]] = {}
        for index, run in enumerate(runs):
            batches = groups.setdefault(run.batch_key, [[]])
            if batches[-1] and sum(len(runs[i].rows) for i in [*batches[-1], index]) > MAX_BATCH_ROWS:
                batches.append([])
            batches[-1].append(index)
        with torch.inference_mode():
            return GroupedForward(
                [
                    (batch, self._forward([runs[index] for index in batch]))
                    for batches in groups.values()
                    for batch in batches
                ]
            )

    def memory(self) -> dict[str, float]:
        return {"held_bytes": self.held.used}

    def facts(self) -> dict[str, Any]:
        return {"max_pixels": self._max_pixels}

    def describe(self, layers: str) -> list[str]:
        return [
            f"blocks {layers} on {self.device.type} in {str(self.dtype).removeprefix('torch.')} "
            f"({self.parameter_bytes:,} bytes of weights)"
        ]

    def _forward(self, runs: Sequence[DenoiserRun]) -> Forward:
        conditioning = runs[0].conditioning
        if self._blocks.per_row:
            # Selected only now, because all rows of all waiting steps would take much more memory.
            selected = [[_rows(tensor, run.rows) for tensor in run.conditioning.tensors] for run in runs]
            conditioning = StepConditioning(_joined(selected), conditioning.scales)
        compute: RunBlocks = self._blocks if self._graphs is None else self._graphs.run
        output = compute(_joined([run.tensors for run in runs]), conditioning)
        return Forward(output, [len(run.rows) for run in runs])

    def _encode(self, output: torch.Tensor, codec: payloads.Codec) -> tuple[payloads.Array, bytes | memoryview]:
        """Encodes an output on the host, by the GPU if there is one. Raises NonFinite."""
        if self._quantizing is None or codec in DTYPES:
            return encode(output, codec)
        with torch.cuda.stream(self._quantizing):
            return self._with_room(lambda: encode(output.to(self.device, non_blocking=True), codec))

    def _with_room(self, compute: Callable[[], _T]) -> _T:
        return compute() if self._graphs is None else self._graphs.with_room(compute)

    def _condition(self, state: ImageState, request: payloads.Conditioning, data: memoryview) -> None:
        self._blocks.check_conditioning([array.shape for array in request.arrays], len(request.scales))
        if not all(map(math.isfinite, request.scales)):
            raise Malformed("an IP-Adapter's scales that are not finite")
        self.held.put(
            state, request.key, StepConditioning(tuple(self._decode(request.arrays, data)), tuple(request.scales))
        )

    def _run(self, state: ImageState, request: payloads.Denoise, data: memoryview) -> DenoiserRun:
        shapes = [array.shape for array in request.arrays]
        self._check(request, shapes)
        data = self.held.whole(state, request.sent, data)
        conditioning = (
            self.held.conditioning(state, request.condition)
            if request.condition is not None
            else StepConditioning()
        )
        self._blocks.check_step(shapes, conditioning)
        if self._blocks.per_row:
            self._check_rows(conditioning, request.rows)
        tensors = self._decode(request.arrays, data)
        row_shapes = tuple(tensor.shape[1:] for tensor in tensors)
        batch_key = row_shapes, tensors[0].is_contiguous(), self._blocks.batch_key(conditioning)
        return DenoiserRun(tensors, conditioning, request.rows, batch_key)

    def _decode(self, arrays: list[payloads.Array], data: memoryview) -> list[torch.Tensor]:
        def decoded() -> list[torch.Tensor]:
            parts = zip(arrays, accumulate((array.nbytes for array in arrays), initial=0), strict=False)
            return [
                decode(array, data[begin : begin + array.nbytes], self.device).to(self.dtype)
                for array, begin in parts
            ]

        return self._with_room(decoded)

    def _check(self, request: payloads.Denoise, shapes: list[list[int]]) -> None:
        """Raises Malformed if a step does not fit the body, Oversized if it or its answer is too large."""
        wanted = self._spec.step_shapes(self._split, shapes)
        if shapes != wanted:
            wrong = next((pair for pair in zip(shapes, wanted, strict=False) if pair[0] != pair[1]), None)
            detail = f"{wrong[0]}, not {wrong[1]}" if wrong else f"{len(shapes)} tensors, not {len(wanted)}"
            raise Malformed(f"a step of an image does not fit the model: {detail}")
        if len(request.rows) != shapes[0][0]:
            raise Malformed(f"a step of {shapes[0][0]} rows that names {len(request.rows)}")
        if (pixels := self._spec.image_pixels(self._split, shapes)) > self._max_pixels:
            raise Oversized(
                f"an image of {pixels:,} pixels: this worker takes up to {self._max_pixels:,} (worker --max-pixels)"
            )
        output = payloads.Array(request.codec, self._spec.output_shape(self._split, shapes))
        if request.sent > request.step_bytes:
            raise Malformed(f"a step of {request.step_bytes} bytes, of which {request.sent} came before")
        decoded = FLOAT_BYTES * max(sum(array.size for array in request.arrays), output.size)
        if max(request.step_bytes, output.nbytes, decoded) > MAX_DECODED:
            raise Oversized(
                f"a step of {request.step_bytes} bytes whose answer has {output.nbytes}, and {decoded} in float32: "
                f"at most {MAX_DECODED}; send fewer images at once"
            )

    @staticmethod
    def _check_rows(conditioning: StepConditioning, rows: list[int]) -> None:
        """Raises Malformed if a row is not in the conditioning, Oversized if all rows take too much memory."""
        if any(max(rows) >= len(tensor) for tensor in conditioning.tensors):
            raise Malformed(f"a step names row {max(rows)}, which its conditioning does not have")
        if (size := len(rows) * sum(tensor[0].nbytes for tensor in conditioning.tensors)) > MAX_CONTEXT:
            raise Oversized(f"{len(rows)} rows of embeddings with {size} bytes")


def _rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The given rows of a tensor; zeros for -1."""
    if rows == list(range(len(tensor))):
        return tensor
    zeros = torch.zeros_like(tensor[:1])
    return torch.cat([tensor[row : row + 1] if row >= 0 else zeros for row in rows])


def _joined(groups: Sequence[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*groups, strict=True))
