"""The session of an image: calls the body of a denoiser on a worker.

A step needs nothing from earlier steps, only the image's embeddings. Any worker can therefore take over.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from split_common.errors import Malformed, NeedEmbeddings, Oversized, SessionLost
from split_common.models.denoisers.codecs import decode, encode
from split_common.models.denoisers.spec import DenoiserSpec
from split_common.models.split import Split
from split_common.models.tensors import dtype_name, raw_bytes
from split_common.protocol import payloads
from split_device.sessions.client import Client
from split_device.sessions.distinct import distinct
from split_device.sessions.identity import SessionIdentity
from split_device.sessions.notices import OnNotice
from split_device.sessions.requests import Reply
from split_device.sessions.resilient import ResilientSession
from split_device.sessions.session import RemoteSession
from split_device.sessions.timings import StepTimings

#: How often a worker gets the embeddings for one step before the session moves: other sessions may need its memory.
MAX_EMBEDDINGS = 3


class DenoiserInputs(NamedTuple):
    """The arguments of the body, as its spec defines them: see `split_common.models.denoisers`."""

    #: Tensors of one step: the states, the embedding of the timestep, and others.
    tensors: Sequence[torch.Tensor]
    #: Tensors and scales that are the same for all steps of an image.
    conditioning: Sequence[torch.Tensor] = ()
    scales: Sequence[float] = ()
    #: Further tensors that tell one image from another.
    about: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class EncodedConditioning:
    """The conditioning of an image, encoded: a worker needs it once, before the steps."""

    payload: payloads.Conditioning
    data: bytes


@dataclass(frozen=True)
class DenoiseRequest:
    """A step as it travels, and the conditioning of its image."""

    step: payloads.Denoise
    tensors: bytes
    conditioning: EncodedConditioning | None
    #: The codec and shape of the output that it asks for.
    output: payloads.Array
    timings: StepTimings

    def calls(self) -> list[tuple[payloads.Payload, memoryview | bytes]]:
        """Its messages: parts of tensors that exceed one message, the step, and requests for the output's rest."""
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


class ImageSession:
    """Calls the body of a denoiser on some worker. Any worker may take over at any step.

    Not thread-safe, but any thread may `abandon` it.

    Args:
        client: finds workers.
        spec, split: the denoiser, and its body's blocks.
        codec: encodes the states for the network; None sends them as they are.
        request_id, index, on_notice: of the request that the image answers, see `ResilientSession`.

    Raises:
        ConfigError: the request id is not one.
    """

    def __init__(
        self,
        client: Client,
        spec: DenoiserSpec,
        split: Split,
        codec: payloads.Codec | None = None,
        request_id: str | None = None,
        index: int = 0,
        on_notice: OnNotice | None = None,
    ) -> None:
        self._client = client
        self._session = ResilientSession(client, request_id, index, on_notice)
        self._spec, self._split, self._codec = spec, split, codec
        #: Keys of the embeddings that were sent to the worker.
        self._sent: set[bytes] = set()
        #: Whether no step has run yet.
        self.is_new = True

    def step(self, inputs: DenoiserInputs) -> torch.Tensor:
        """Returns the body's output.

        Raises:
            NonFinite: the inputs hold NaN or infinity.
            Oversized: they have too many rows or bytes for a step.
            SplitError: the worker or the queue failed.
        """
        timings = StepTimings()
        with timings.measure("encode"):
            request = self._request(inputs, timings)
        ((reply, data),) = self._session.call(self, request)
        self.is_new = False
        with timings.measure("decode"):
            assert isinstance(reply, payloads.Denoised)
            states = inputs.tensors[0]
            output = decode(reply.output, data, states.device).to(states.dtype)
        self._client.timings.record(timings)
        return output

    @property
    def identity(self) -> SessionIdentity:
        """What its user and its workers call it."""
        return self._session.identity

    def abandon(self) -> None:
        """Makes the step under way in another thread, and all later ones, fail soon."""
        self._session.abandon()

    def _request(self, inputs: DenoiserInputs, timings: StepTimings) -> DenoiseRequest:
        """Encodes a step. Raises NonFinite and Oversized, see `step`."""
        rows, conditioning = _conditioning(inputs)
        # The embedding of the timestep travels as it is: it is small, and everything depends on it.
        codecs = (self._codec, None, *[self._codec] * (len(inputs.tensors) - 2))
        codec = self._codec or dtype_name(inputs.tensors[0].dtype)
        shapes = [list(tensor.shape) for tensor in inputs.tensors]
        output = payloads.Array(codec, self._spec.output_shape(self._split, shapes))
        states = [encode(tensor, codec) for tensor, codec in zip(inputs.tensors, codecs, strict=True)]
        data = b"".join(data for _, data in states)
        most = max(len(data), output.nbytes)
        if len(rows) > payloads.MAX_IMAGE_ROWS or most > payloads.MAX_STEP:
            raise Oversized(
                f"the step has {len(rows)} rows and {most:,} bytes; the limits are {payloads.MAX_IMAGE_ROWS} rows "
                f"and {payloads.MAX_STEP:,} bytes: choose a smaller codec, or make fewer images at once"
            )
        key = conditioning.payload.key if conditioning is not None else None
        sent = (len(data) - 1) // payloads.PART_BYTES * payloads.PART_BYTES
        step = payloads.Denoise(key, rows, [array for array, _ in states], codec, sent=sent)
        return DenoiseRequest(step, data, conditioning, output, timings)

    # --- what fail-over asks of a step (`Replayable`) ------------------------------------------------------

    def replay(self, _session: RemoteSession, _step: DenoiseRequest) -> None:
        """Nothing is sent ahead of a step: `send` sends a new worker the embeddings again."""
        self._sent = set()

    def send(self, session: RemoteSession, step: DenoiseRequest) -> list[Reply]:
        for attempt in itertools.count(1):
            calls = step.calls()
            new = step.conditioning
            if new is not None and new.payload.key not in self._sent:
                calls.insert(0, (new.payload, new.data))
                self._sent.add(new.payload.key)
            try:
                with step.timings.measure_rest("queue"):
                    return [self._join_parts(step, session.call(calls, step.timings))]
            except NeedEmbeddings as error:
                # The worker has dropped the embeddings, perhaps in favour of another session.
                self._sent.clear()
                if attempt == MAX_EMBEDDINGS:
                    session.close()
                    raise SessionLost(f"{error}: it has dropped them {attempt} times") from None
        raise AssertionError

    def is_spoilt(self, _step: DenoiseRequest) -> bool:
        return False

    def describe(self, step: DenoiseRequest) -> tuple[int, int, int]:
        return len(step.step.rows), 0, 0

    def _join_parts(self, request: DenoiseRequest, replies: list[Reply]) -> Reply:
        """The answer to a step, with all bytes of the output. Raises Malformed if codec or shape differ."""
        answers = [
            (reply, data) for reply, data in replies if isinstance(reply, payloads.Denoised | payloads.TensorPart)
        ]
        denoised = answers[0][0]
        assert isinstance(denoised, payloads.Denoised)
        request.timings.add("body", denoised.body_us / 1e6)
        request.timings.add("worker", denoised.worker_us / 1e6)
        wanted = request.output
        if (denoised.output.codec, denoised.output.shape) != (wanted.codec, wanted.shape):
            raise Malformed(f"the worker returned no output of the shape {wanted.shape}")
        return denoised, memoryview(b"".join(data for _, data in answers)) if len(answers) > 1 else answers[0][1]


def _conditioning(inputs: DenoiserInputs) -> tuple[list[int], EncodedConditioning | None]:
    """For each row of the step, its row in the conditioning, -1 for zeros; and the conditioning."""
    count = len(inputs.tensors[0])
    if not inputs.conditioning:
        return [-1] * count, None
    # Pipelines repeat embeddings for each image of a prompt.
    sent, rows = distinct(map(_row_key, zip(*inputs.conditioning, strict=True)))
    encoded = [encode(tensor[sent or [0]]) for tensor in inputs.conditioning]
    arrays, data = [array for array, _ in encoded], b"".join(data for _, data in encoded)
    scales = list(inputs.scales)
    key = hashlib.blake2b(repr((arrays, scales)).encode() + data, digest_size=32).digest()
    return rows, EncodedConditioning(payloads.Conditioning(key, arrays, scales), data)


def _row_key(parts: Sequence[torch.Tensor]) -> bytes | None:
    """A key that is equal for equal rows; None for a row of zeros, such as SDXL's default negative embeddings."""
    if not any(part.any() for part in parts):
        return None
    return hashlib.blake2b(b"".join(map(raw_bytes, parts))).digest()
