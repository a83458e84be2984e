"""A session of image jobs: steps out, outputs in. All that a worker has to know beside a step is its embeddings."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from split_common import wire
from split_common.diffusion.codecs import decode, encode
from split_common.diffusion.plan import ImagePlan
from split_common.errors import Malformed, NeedEmbeddings, Oversized
from split_common.split import Split
from split_common.tensors import dtype_name, raw_bytes
from split_device.client import Client
from split_device.lasting import Lasting
from split_device.session import RemoteSession

#: Bytes of tensors in one message, at most; steps of many rows travel in several. The rest is for padding.
MESSAGE_BYTES = wire.MAX_BODY * 3 // 4

#: Times that a worker is sent the embeddings for one step before it is given up.
MAX_EMBEDDINGS = 3


class Inputs(NamedTuple):
    """What the body is called with, as its plan says: see `split_common.diffusion`."""

    #: Of a step: the states, the embedding of the time, and more.
    tensors: Sequence[torch.Tensor]
    #: Of the whole image.
    job: Sequence[torch.Tensor] = ()
    scales: Sequence[float] = ()
    #: What else tells one image from another.
    about: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Condition:
    """What a worker is sent of an image beside its steps."""

    payload: wire.Condition
    data: bytes


@dataclass(frozen=True)
class Request:
    """Some rows of a step, and what they need of their image."""

    step: wire.Denoise
    tensors: bytes
    condition: Condition | None


class ImageSession(Lasting[Request]):
    """Calls the body of a denoiser on some worker. Any worker may take over at any step.

    Args:
        client: finds workers.
        plan, split: the denoiser, and its body's blocks.
        codec: of the states on the way; None sends them as they are.
    """

    def __init__(self, client: Client, plan: ImagePlan, split: Split, codec: wire.Codec | None = None) -> None:
        super().__init__(client)
        self._plan, self._split, self._codec = plan, split, codec
        #: Keys of embeddings that the worker was sent.
        self._sent: set[bytes] = set()
        self._steps = 0

    def step(self, inputs: Inputs) -> torch.Tensor:
        """The body's output.

        Raises:
            NonFinite: the inputs hold NaN or infinity.
            Oversized: not even one row fits into a message.
            SplitError: the worker or the queue failed.
        """
        requests = self._requests(inputs)
        replies = self._persist(requests)
        self._steps += 1
        self.client.timings.steps += 1
        with self.client.timings.measure("decode"):
            outputs = [self._output(request, *reply) for request, reply in zip(requests, replies, strict=True)]
        return torch.cat(outputs).to(inputs.tensors[0])

    def _requests(self, inputs: Inputs) -> list[Request]:
        with self.client.timings.measure("encode"):
            rows, condition = _condition(inputs)
            at_once = self._rows_at_once(inputs)
            return [
                self._request(inputs, slice(begin, begin + at_once), rows, condition)
                for begin in range(0, len(rows), at_once)
            ]

    def _request(self, inputs: Inputs, part: slice, rows: list[int], condition: Condition | None) -> Request:
        # The embedding of the time is small, and everything depends on it.
        codecs = (self._codec, None, *[self._codec] * (len(inputs.tensors) - 2))
        states = [encode(tensor[part], codec) for tensor, codec in zip(inputs.tensors, codecs, strict=True)]
        step = wire.Denoise(
            condition.payload.key if condition is not None else None,
            rows[part],
            [array for array, _ in states],
            self._answer_codec(inputs),
        )
        return Request(step, b"".join(data for _, data in states), condition)

    def _answer_codec(self, inputs: Inputs) -> wire.Codec:
        return self._codec or dtype_name(inputs.tensors[0].dtype)

    def _rows_at_once(self, inputs: Inputs) -> int:
        """Rows of a step that travel in one message."""
        codec = self._answer_codec(inputs)
        shapes = [[1, *tensor.shape[1:]] for tensor in inputs.tensors]
        codecs = (codec, dtype_name(inputs.tensors[1].dtype), *[codec] * (len(shapes) - 2))
        up = sum(wire.Array(each, shape).nbytes for each, shape in zip(codecs, shapes, strict=True))
        down = wire.Array(codec, self._plan.output_shape(self._split, shapes)).nbytes
        size = max(up, down)
        if size > MESSAGE_BYTES:
            raise Oversized(
                f"an image of this size takes {size:,} bytes a step, a message has {MESSAGE_BYTES:,}: choose a "
                "smaller codec (fp16, int8, int4), or a smaller image"
            )
        return min(wire.MAX_IMAGE_ROWS, MESSAGE_BYTES // size)

    def _output(self, request: Request, reply: wire.AnyReply, data: memoryview) -> torch.Tensor:
        """Raises Malformed or NonFinite for an answer to something else."""
        wanted = self._plan.output_shape(self._split, [array.shape for array in request.step.arrays])
        if not isinstance(reply, wire.Denoised) or (reply.output.codec, reply.output.shape) != (
            request.step.codec,
            wanted,
        ):
            raise Malformed(f"the worker returned no output of the shape {wanted}")
        return decode(reply.output, data)

    # --- what the session does wherever it is --------------------------------------------------------------

    def _open(self, avoid: list[bytes]) -> None:
        self._sent = set()
        self._hold(self.client.open_session(avoid, self._number, next(self._epochs)))

    def _send(self, remote: RemoteSession, requests: list[Request]) -> list[tuple[wire.AnyReply, memoryview]]:
        timings = self.client.timings
        condition = requests[0].condition
        for attempt in itertools.count(1):
            calls: list[tuple[wire.Payload, memoryview | bytes]] = []
            if new := condition is not None and condition.payload.key not in self._sent:
                assert condition is not None
                calls.append((condition.payload, condition.data))
                self._sent.add(condition.payload.key)
            calls += [(request.step, request.tensors) for request in requests]
            try:
                with timings.measure_rest("queue"):
                    replies = remote.call(calls)
                    for reply, _ in replies:
                        if isinstance(reply, wire.Denoised):
                            timings.add("body", reply.body_us / 1e6)
                            timings.add("worker", reply.worker_us / 1e6)
                return replies[new:]
            except NeedEmbeddings:
                # The worker has forgotten them, or another one's came between.
                self._sent.clear()
                if attempt == MAX_EMBEDDINGS:
                    raise
        raise AssertionError

    def _letter(self, requests: list[Request]) -> tuple[int, int, int]:
        return sum(len(request.step.rows) for request in requests), 0, 0

    def _is_new(self) -> bool:
        return not self._steps


def _condition(inputs: Inputs) -> tuple[list[int], Condition | None]:
    """Which row of what is sent of the image belongs to each row of the step, -1 for zeros; and what is sent."""
    if not inputs.job:
        return [-1] * len(inputs.tensors[0]), None
    rows, sent = _distinct(inputs.job)
    encoded = [encode(tensor[sent]) for tensor in inputs.job]
    arrays, data = [array for array, _ in encoded], b"".join(data for _, data in encoded)
    scales = list(inputs.scales)
    key = hashlib.blake2b(repr((arrays, scales)).encode() + data, digest_size=32).digest()
    return rows, Condition(wire.Condition(key, arrays, scales), data)


def _distinct(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """For each row, which of the distinct ones it is, -1 for one of zeros; and the distinct rows' indices.

    Pipelines repeat embeddings for each image of a prompt. The default negative ones of SDXL are zeros.
    """
    seen: dict[bytes, int] = {}
    rows, sent = [], []
    for index, parts in enumerate(zip(*tensors, strict=True)):
        if not any(part.any() for part in parts):
            rows.append(-1)
            continue
        key = hashlib.blake2b(b"".join(map(raw_bytes, parts))).digest()
        if key not in seen:
            seen[key] = len(seen)
            sent.append(index)
        rows.append(seen[key])
    return rows, sent or [0]
