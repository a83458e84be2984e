"""The body of a diffusion model's UNet, as the compute loop runs it: steps of one shape share a forward."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from split_common import wire
from split_common.diffusion.codecs import decode, encode
from split_common.diffusion.middle import Middle
from split_common.diffusion.unet import UNetPlan
from split_common.engine.rows import Row, Run
from split_common.engine.runner import Launched
from split_common.errors import Malformed, NeedEmbeddings, Oversized
from split_common.split import Split

#: Bytes of embeddings that are held unless told otherwise; those that were used least lately give way.
MEMORY = 1024**3

#: Rows in one forward, at most; a step with more has one of its own.
MAX_BATCH_ROWS = 16

#: Bytes of an answer, at most: what is left of a message's after padding.
MAX_ANSWER = wire.MAX_BODY * 3 // 4

#: Bytes of the embeddings of one step's rows, at most.
MAX_CONTEXT = 256 * 1024**2

#: Seconds that the first forward may take: a large image on a CPU.
FIRST_TURN = 900.0

#: Sessions are admitted by their number: they keep nothing that may not be forgotten.
UNBOUNDED = sys.maxsize


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
    """Embeddings of image jobs, by session and key. Used by the thread that computes."""

    #: A step needs no room here.
    free = free_tokens = capacity = UNBOUNDED

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._held: OrderedDict[tuple[ConditionRow, bytes], torch.Tensor] = OrderedDict()

    def new_row(self) -> ConditionRow:
        return ConditionRow(self)

    def cost(self, row: Row, tokens: int) -> int:
        return 0

    def put(self, row: ConditionRow, key: bytes, embeddings: torch.Tensor) -> None:
        self._held[row, key] = embeddings
        self._held.move_to_end((row, key))
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._memory:
            self._held.popitem(last=False)

    def get(self, row: ConditionRow, key: bytes) -> torch.Tensor:
        """Raises NeedEmbeddings."""
        if (row, key) not in self._held:
            raise NeedEmbeddings("the worker does not hold the embeddings of this image")
        self._held.move_to_end((row, key))
        return self._held[row, key]

    def forget(self, row: ConditionRow) -> None:
        for place in [place for place in self._held if place[0] is row]:
            del self._held[place]


@dataclass(frozen=True)
class ImageRun(Run):
    """A step's inputs, as `Middle` takes them; `states` is the sample. Its positions count for its size only."""

    embedding: torch.Tensor
    context: torch.Tensor
    residuals: list[torch.Tensor]

    @property
    def shape(self) -> object:
        """Steps of the same shape can share a forward."""
        return self.states.shape[1:], self.states.is_contiguous(), self.context.shape[1:], len(self.residuals)


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
    """A loaded body of a UNet, in the place of a language model's `Body`.

    Args:
        plan: the UNet.
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
        plan: UNetPlan,
        split: Split,
        device: torch.device,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
    ) -> None:
        self._plan, self._split = plan, split
        self._middle = Middle(plan, split, dtype).to(device)
        parameter = next(self._middle.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.asynchronous = self.device.type == "cuda"
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in self._middle.parameters())
        self.store = ConditionStore(MEMORY if memory is None else memory)
        self._context_width = _context_width(self._middle)

    def condition(self, rows: list[Row], request: wire.Condition, data: memoryview) -> None:
        """Takes a job's embeddings into its session's row. Raises Malformed or NonFinite."""
        width = request.embeddings.shape[-1]
        if len(request.embeddings.shape) != 3 or self._context_width not in (None, width):
            raise Malformed(f"embeddings {request.embeddings.shape}, the model's width is {self._context_width}")
        embeddings = decode(request.embeddings, data)
        self.store.put(self._row(rows), request.key, embeddings.to(self.device, self.dtype))

    def begin(self, rows: list[Row], request: wire.Denoise, data: memoryview) -> list[Run]:
        """The run of a step.

        Raises:
            NeedEmbeddings: they are not held (any more).
            Malformed, Oversized, NonFinite: the tensors do not fit the body, or each other.
        """
        row = self._row(rows)
        self._check(request)
        tensors, offset = [], 0
        for array in request.arrays:
            tensors.append(decode(array, data[offset : offset + array.nbytes]).to(self.device, self.dtype))
            offset += array.nbytes
        embeddings = self.store.get(row, request.condition)
        if len(request.rows) * embeddings[0].nbytes > MAX_CONTEXT:
            raise Oversized(f"{len(request.rows)} rows of {embeddings[0].nbytes} bytes of embeddings")
        context = self._select(embeddings, request.rows)
        size = len(request.rows) * tensors[0].shape[2] * tensors[0].shape[3]
        return [ImageRun(row, tensors[0], range(size), tensors[1], context, tensors[2:])]

    def answer(self, request: wire.Denoise, output: torch.Tensor) -> tuple[wire.Array, memoryview | bytes]:
        """The output as the device wants it. Raises NonFinite."""
        return encode(output, request.codec)

    def launch(self, runs: Sequence[Run]) -> LaunchedImages:
        """Starts a forward for each group of steps of one shape."""
        groups: dict[object, list[list[int]]] = {}
        images = [run for run in runs if isinstance(run, ImageRun)]
        for index, run in enumerate(images):
            batches = groups.setdefault(run.shape, [[]])
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
        output = self._middle(
            torch.cat([run.states for run in runs]),
            torch.cat([run.embedding for run in runs]),
            torch.cat([run.context for run in runs]),
            [torch.cat(residuals) for residuals in zip(*(run.residuals for run in runs), strict=True)],
        )
        return Launched(output, [len(run.states) for run in runs], range(len(runs)))

    def _row(self, rows: list[Row]) -> ConditionRow:
        if not rows:
            rows.append(self.store.new_row())
        row = rows[0]
        assert isinstance(row, ConditionRow)
        return row

    def _check(self, request: wire.Denoise) -> None:
        """Raises Malformed or Oversized for shapes that are not the body's."""
        count = len(request.rows)
        shapes = [array.shape for array in request.arrays]
        if len(shapes[0]) != 4:
            raise Malformed(f"states of the shape {shapes[0]}: they have rows, channels, height and width")
        height, width = shapes[0][2:]
        skips = [[count, *shape] for shape in self._plan.skip_shapes(self._split, height, width)]
        wanted = [skips[0], [count, self._plan.embedding], *(skips if len(shapes) > 2 else ())]
        if shapes != wanted:
            wrong = next((pair for pair in zip(shapes, wanted, strict=False) if pair[0] != pair[1]), None)
            detail = f"{wrong[0]}, not {wrong[1]}" if wrong else f"{len(shapes)} tensors, not {len(wanted)}"
            raise Malformed(f"a step of an image does not fit the model: {detail}")
        output = wire.Array(request.codec, [count, self._plan.channels[self._split.first], height, width])
        if output.nbytes > MAX_ANSWER:
            raise Oversized(f"a step whose answer has {output.nbytes} bytes: send fewer rows at once")

    @staticmethod
    def _select(embeddings: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """The embeddings of each row; raises Malformed for one that the job does not have."""
        if max(rows) >= len(embeddings):
            raise Malformed(f"a step names row {max(rows)} of {len(embeddings)} rows of embeddings")
        zeros = torch.zeros_like(embeddings[:1])
        return torch.cat([embeddings[row : row + 1] if row >= 0 else zeros for row in rows])


def _context_width(middle: Middle) -> int | None:
    """Width of the embeddings that the body attends to; None if it does not."""
    for name, parameter in middle.named_parameters():
        if name.endswith("attn2.to_k.weight"):
            return int(parameter.shape[1])
    return None
