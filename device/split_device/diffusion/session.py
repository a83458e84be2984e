"""A session of image jobs: steps out, outputs in. All that a worker has to know beside a step is its embeddings."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from split_common import payloads
from split_common.diffusion.codecs import decode, encode
from split_common.diffusion.plan import ImagePlan
from split_common.errors import Malformed, NeedEmbeddings, Oversized, SessionLost
from split_common.split import Split
from split_common.tensors import dtype_name, raw_bytes
from split_device.sessions.client import Client
from split_device.sessions.lasting import Lasting
from split_device.sessions.session import RemoteSession

#: Times that a worker is sent everything for one step before another one is looked for: others may need its memory.
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

    payload: payloads.Condition
    data: bytes


@dataclass(frozen=True)
class Request:
    """A step, and what it needs of its image."""

    step: payloads.Denoise
    tensors: bytes
    condition: Condition | None
    #: The output that it calls for.
    output: payloads.Array

    def calls(self) -> list[tuple[payloads.Payload, memoryview | bytes]]:
        """Its messages: those with what does not fit into one, the step itself, and those that ask for the rest."""
        data = memoryview(self.tensors)
        parts = [
            data[begin : begin + payloads.PART_BYTES] for begin in range(0, self.step.sent, payloads.PART_BYTES)
        ]
        size = self.output.nbytes
        return [
            *(
                (payloads.TensorPart(index * payloads.PART_BYTES, len(part)), part)
                for index, part in enumerate(parts)
            ),
            (self.step, data[self.step.sent :]),
            *(
                (payloads.PartRequest(begin, min(payloads.PART_BYTES, size - begin)), b"")
                for begin in range(payloads.PART_BYTES, size, payloads.PART_BYTES)
            ),
        ]


class ImageSession(Lasting[Request]):
    """Calls the body of a denoiser on some worker. Any worker may take over at any step.

    Args:
        client: finds workers.
        plan, split: the denoiser, and its body's blocks.
        codec: of the states on the way; None sends them as they are.
    """

    def __init__(self, client: Client, plan: ImagePlan, split: Split, codec: payloads.Codec | None = None) -> None:
        super().__init__(client)
        self._plan, self._split, self._codec = plan, split, codec
        #: Keys of embeddings that the worker was sent.
        self._sent: set[bytes] = set()
        self._steps = 0

    def step(self, inputs: Inputs) -> torch.Tensor:
        """The body's output.

        Raises:
            NonFinite: the inputs hold NaN or infinity.
            Oversized: there are too many of them.
            SplitError: the worker or the queue failed.
        """
        with self.client.timings.measure("encode"):
            request = self._request(inputs)
        ((reply, data),) = self._persist([request])
        self._steps += 1
        self.client.timings.steps += 1
        with self.client.timings.measure("decode"):
            assert isinstance(reply, payloads.Denoised)
            states = inputs.tensors[0]
            return decode(reply.output, data, states.device).to(states.dtype)

    def _request(self, inputs: Inputs) -> Request:
        """A step as it travels. Raises NonFinite, Oversized."""
        rows, condition = _condition(inputs)
        # The embedding of the time is small, and everything depends on it.
        codecs = (self._codec, None, *[self._codec] * (len(inputs.tensors) - 2))
        codec = self._codec or dtype_name(inputs.tensors[0].dtype)
        shapes = [list(tensor.shape) for tensor in inputs.tensors]
        output = payloads.Array(codec, self._plan.output_shape(self._split, shapes))
        states = [encode(tensor, codec) for tensor, codec in zip(inputs.tensors, codecs, strict=True)]
        data = b"".join(data for _, data in states)
        most = max(len(data), output.nbytes)
        if len(rows) > payloads.MAX_IMAGE_ROWS or most > payloads.MAX_STEP:
            raise Oversized(
                f"a step of {len(rows)} rows with {most:,} bytes, and not {payloads.MAX_IMAGE_ROWS} with "
                f"{payloads.MAX_STEP:,} at most: choose a smaller codec, or make fewer images at once"
            )
        key = condition.payload.key if condition is not None else None
        sent = (len(data) - 1) // payloads.PART_BYTES * payloads.PART_BYTES
        step = payloads.Denoise(key, rows, [array for array, _ in states], codec, sent=sent)
        return Request(step, data, condition, output)

    # --- what the session does wherever it is --------------------------------------------------------------

    def _open(self, avoid: list[bytes]) -> None:
        self._sent = set()
        self._hold(self.client.open_session(avoid, self._number, next(self._epochs), self._check))
        # Nothing is sent again but embeddings, and the step that was lost.
        self.client.counters["replays"] += self._steps > 0

    def _send(self, remote: RemoteSession, requests: list[Request]) -> list[tuple[payloads.AnyReply, memoryview]]:
        timings = self.client.timings
        (request,) = requests
        for attempt in itertools.count(1):
            calls = request.calls()
            new = request.condition
            if new is not None and new.payload.key not in self._sent:
                calls.insert(0, (new.payload, new.data))
                self._sent.add(new.payload.key)
            try:
                with timings.measure_rest("queue"):
                    replies = remote.call(calls)
                    return [self._joined(request, replies)]
            except NeedEmbeddings as error:
                # The worker has forgotten something, or another session's came between.
                self._sent.clear()
                if attempt == MAX_EMBEDDINGS:
                    remote.close()
                    raise SessionLost(f"{error}, though it was sent them {attempt} times") from None
        raise AssertionError

    def _joined(
        self, request: Request, replies: list[tuple[payloads.AnyReply, memoryview]]
    ) -> tuple[payloads.AnyReply, memoryview]:
        """The answer to a step, with all bytes of the output. Raises Malformed for one to something else."""
        answers = [
            (reply, data) for reply, data in replies if isinstance(reply, payloads.Denoised | payloads.TensorPart)
        ]
        denoised = answers[0][0]
        assert isinstance(denoised, payloads.Denoised)
        self.client.timings.add("body", denoised.body_us / 1e6)
        self.client.timings.add("worker", denoised.worker_us / 1e6)
        wanted = request.output
        if (denoised.output.codec, denoised.output.shape) != (wanted.codec, wanted.shape):
            raise Malformed(f"the worker returned no output of the shape {wanted.shape}")
        return denoised, memoryview(b"".join(data for _, data in answers)) if len(answers) > 1 else answers[0][1]

    def _letter(self, requests: list[Request]) -> tuple[int, int, int]:
        return len(requests[0].step.rows), 0, 0

    def _is_new(self) -> bool:
        return not self._steps


def _condition(inputs: Inputs) -> tuple[list[int], Condition | None]:
    """Which row of what is sent of the image belongs to each row of the step, -1 for zeros; and what is sent."""
    count = len(inputs.tensors[0])
    if not inputs.job:
        return [-1] * count, None
    rows, sent = _distinct(inputs.job)
    encoded = [encode(tensor[sent]) for tensor in inputs.job]
    arrays, data = [array for array, _ in encoded], b"".join(data for _, data in encoded)
    scales = list(inputs.scales)
    key = hashlib.blake2b(repr((arrays, scales)).encode() + data, digest_size=32).digest()
    return rows, Condition(payloads.Condition(key, arrays, scales), data)


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
