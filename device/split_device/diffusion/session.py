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
from split_common.diffusion.unet import UNetPlan
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
    """What the body is called with, see `split_common.diffusion.middle`."""

    sample: torch.Tensor
    embedding: torch.Tensor
    context: torch.Tensor
    residuals: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Request:
    """Some rows of a step, and the embeddings that they need."""

    step: wire.Denoise
    tensors: bytes
    condition: wire.Condition
    embeddings: memoryview | bytes


class ImageSession(Lasting[Request]):
    """Calls the body of a UNet on some worker. Any worker may take over at any step.

    Args:
        client: finds workers.
        plan, split: the UNet, and its body's blocks.
        codec: of the states on the way; None sends them as they are.
    """

    def __init__(self, client: Client, plan: UNetPlan, split: Split, codec: wire.Codec | None = None) -> None:
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
        return torch.cat(outputs).to(inputs.sample)

    def _requests(self, inputs: Inputs) -> list[Request]:
        with self.client.timings.measure("encode"):
            rows, distinct = _distinct(inputs.context)
            array, embeddings = encode(distinct)
            key = hashlib.blake2b(repr(array).encode() + embeddings, digest_size=32).digest()
            condition = wire.Condition(key, array)
            at_once = self._rows_at_once(inputs)
            return [
                self._request(inputs, slice(begin, begin + at_once), rows, condition, embeddings)
                for begin in range(0, len(rows), at_once)
            ]

    def _request(
        self,
        inputs: Inputs,
        part: slice,
        rows: list[int],
        condition: wire.Condition,
        embeddings: memoryview | bytes,
    ) -> Request:
        states = [encode(tensor[part], self._codec) for tensor in (inputs.sample, *inputs.residuals)]
        # The embedding of the time is small, and everything depends on it.
        states.insert(1, encode(inputs.embedding[part]))
        codec = self._codec or dtype_name(inputs.sample.dtype)
        step = wire.Denoise(condition.key, rows[part], [array for array, _ in states], codec)
        return Request(step, b"".join(data for _, data in states), condition, embeddings)

    def _rows_at_once(self, inputs: Inputs) -> int:
        """Rows of a step that travel in one message."""
        codec = self._codec or dtype_name(inputs.sample.dtype)
        up = [wire.Array(codec, [1, *tensor.shape[1:]]) for tensor in (inputs.sample, *inputs.residuals)]
        up.append(wire.Array(dtype_name(inputs.embedding.dtype), [1, inputs.embedding.shape[1]]))
        down = self._output_array(codec, [1, *inputs.sample.shape[1:]])
        size = max(sum(array.nbytes for array in up), down.nbytes)
        if size > MESSAGE_BYTES:
            raise Oversized(
                f"an image of this size takes {size:,} bytes a step, a message has {MESSAGE_BYTES:,}: choose a "
                "smaller codec (fp16, int8, int4), or a smaller image"
            )
        return min(wire.MAX_IMAGE_ROWS, MESSAGE_BYTES // size)

    def _output_array(self, codec: wire.Codec, shape: list[int]) -> wire.Array:
        return wire.Array(codec, [shape[0], self._plan.channels[self._split.first], *shape[2:]])

    def _output(self, request: Request, reply: wire.AnyReply, data: memoryview) -> torch.Tensor:
        """Raises Malformed or NonFinite for an answer to something else."""
        wanted = self._output_array(request.step.codec, request.step.arrays[0].shape)
        if not isinstance(reply, wire.Denoised) or (reply.output.codec, reply.output.shape) != (
            wanted.codec,
            wanted.shape,
        ):
            raise Malformed(f"the worker returned no output of the shape {wanted.shape}")
        return decode(reply.output, data)

    # --- what the session does wherever it is --------------------------------------------------------------

    def _open(self, avoid: list[bytes]) -> None:
        self._sent = set()
        self._hold(self.client.open_session(avoid, self._number, next(self._epochs)))
        # Nothing is sent again but embeddings, and the step that was lost.
        self.client.counters["replays"] += self._steps > 0

    def _send(self, remote: RemoteSession, requests: list[Request]) -> list[tuple[wire.AnyReply, memoryview]]:
        timings = self.client.timings
        condition = requests[0].condition
        for attempt in itertools.count(1):
            calls: list[tuple[wire.Payload, memoryview | bytes]] = []
            if new := condition.key not in self._sent:
                calls.append((condition, requests[0].embeddings))
            calls += [(request.step, request.tensors) for request in requests]
            self._sent.add(condition.key)
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
                self._sent.discard(condition.key)
                if attempt == MAX_EMBEDDINGS:
                    raise
        raise AssertionError

    def _letter(self, requests: list[Request]) -> tuple[int, int, int]:
        return sum(len(request.step.rows) for request in requests), 0, 0

    def _is_new(self) -> bool:
        return not self._steps


def _distinct(context: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Which of the embeddings that are sent belongs to each row, -1 for one of zeros; and these embeddings.

    Pipelines repeat them for each image of a prompt. The default negative ones of SDXL are zeros.
    """
    seen: dict[bytes, int] = {}
    rows, sent = [], []
    for index, row in enumerate(context):
        if not row.any():
            rows.append(-1)
            continue
        key = hashlib.blake2b(raw_bytes(row)).digest()
        if key not in seen:
            seen[key] = len(seen)
            sent.append(index)
        rows.append(seen[key])
    return rows, context[sent or [0]]
