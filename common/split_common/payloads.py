"""Payloads: what a message's body holds once it is opened, for texts and for images.

A body's plaintext is a length (4 bytes, little-endian), a msgspec payload, the raw bytes of the tensors that the
payload names, and padding. `split_common.channel` seals it; the broker never sees it.

Payloads are untrusted input: decoding checks each length and range, and raises a `ProtocolError`. They travel as
arrays, so the order of fields and the tags are the format; the names of classes and fields are not.

Nothing here imports torch.
"""

from __future__ import annotations

import math
import struct
from typing import Annotated, Literal, TypeVar

import msgspec

from split_common.errors import Malformed, Oversized
from split_common.headers import MAX_BODY, Hash, Natural, Seconds

#: Largest msgspec payload of a body, in bytes: what is decoded into objects, not the tensor.
MAX_PAYLOAD = 1024 * 1024

#: Itemsize in bytes of each dtype that hidden states may have on the wire.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

Dtype = Literal["float32", "bfloat16", "float16"]

#: How the numbers of an image's states travel: as they are, or as integers with one scale for each channel.
Codec = Literal["float32", "bfloat16", "float16", "int8", "int4"]

#: Bits of a number in each codec, and bytes of a scale where it has scales.
CODEC_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
SCALE_BYTES = 4

#: Rows (images and their negatives) and tensors of one step of an image job, at most.
MAX_IMAGE_ROWS = 256
MAX_ARRAYS = 64

#: Bytes of the tensors of one step of an image job, and of its answer, at most; and of one message's share of them.
MAX_STEP = 512 * 1024**2
PART_BYTES = 4 * 1024**2

#: Scales of an image job, at most.
MAX_SCALES = 4096

#: What a peer may lack; the two ends of a channel agree on what both have. "fork" is a copy of a session on its
#: worker, "int4" and "int8" are codecs. New kinds of requests, rows and codecs add their names here.
CAPABILITIES = frozenset({"fork", "int4", "int8"})


class Payload(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Head of an opened body."""

    @property
    def reserved(self) -> int:
        """Bytes that are set aside for it, so that the size of a step does not tell how large its numbers are."""
        return 64

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors that follow it in the body."""
        return 0

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities that its receiver must have."""
        return frozenset()


class Run(msgspec.Struct, array_like=True, frozen=True):
    """A run of tokens to append to one row of a session.

    `start` is the row's cache length before the run: the worker truncates the row to it. `positions` are the
    tokens' (rotary) positions, which padding makes different from cache indices.
    """

    row: Annotated[int, msgspec.Meta(ge=0, lt=4096)]
    start: Natural
    positions: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]], msgspec.Meta(min_length=1)]


class Step(Payload, frozen=True, tag=1):
    """One call of the body: the tensor is the hidden states of all runs, `[tokens, width]`, row after row."""

    dtype: Dtype
    width: Annotated[int, msgspec.Meta(ge=1, lt=2**20)]
    rows: Annotated[list[Run], msgspec.Meta(max_length=4096)]
    #: New row i is old row `select[i]`; applied before the runs are appended. None leaves the rows as they are.
    select: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=4096)] | None = None
    #: All replies below this sequence number have arrived.
    acked: Natural = 0

    @property
    def reserved(self) -> int:
        return 64 + 12 * len(self.rows) + 5 * self.tokens + 3 * max(len(self.rows), len(self.select or ()))

    @property
    def tokens(self) -> int:
        return sum(len(row.positions) for row in self.rows)

    @property
    def tensor_bytes(self) -> int:
        return self.tokens * self.width * DTYPES[self.dtype]


class Fork(Payload, frozen=True, tag=2):
    """Opens the session as a copy of another one of the same channel."""

    parent: Natural
    parent_epoch: Natural

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"fork"})


class Close(Payload, frozen=True, tag=3):
    """Frees the session. Not answered."""


class Result(Payload, frozen=True, tag=4):
    """Answer to a step: the body's output, `[tokens, width]`. Times in microseconds."""

    dtype: Dtype
    tokens: Natural
    width: Annotated[int, msgspec.Meta(ge=1, lt=2**20)]
    body_us: Natural = 0
    worker_us: Natural = 0

    @property
    def tensor_bytes(self) -> int:
        return self.tokens * self.width * DTYPES[self.dtype]


class Done(Payload, frozen=True, tag=5):
    """Answer to a fork; of session 0, to the end of a channel's set-up."""


class Array(msgspec.Struct, array_like=True, frozen=True):
    """One of the tensors of a body. Scales, one for each channel of each row, come before the numbers."""

    codec: Codec
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=1, lt=2**20)]], msgspec.Meta(min_length=2, max_length=4)]
    #: How its end keeps it in memory: convolutions of another layout round otherwise. It travels in C order.
    channels_last: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def scales(self) -> int:
        return self.shape[0] * self.shape[1] if self.codec in ("int8", "int4") else 0

    @property
    def nbytes(self) -> int:
        return (self.size * CODEC_BITS[self.codec] + 7) // 8 + self.scales * SCALE_BYTES


class Condition(Payload, frozen=True, tag=7):
    """What an image is made after: the text's embeddings `[rows, tokens, width]`, say. Sent once for each job.

    `key` is how steps name it. A worker may forget it, and then refuses a step with "embeddings".
    """

    key: Hash
    arrays: Annotated[list[Array], msgspec.Meta(min_length=1, max_length=MAX_ARRAYS)]
    #: How much each of the body's attentions to an IP-Adapter's images counts.
    scales: Annotated[list[float], msgspec.Meta(max_length=MAX_SCALES)] = []

    @property
    def tensor_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Denoise(Payload, frozen=True, tag=8):
    """One call of an image model's body, complete in itself but for the embeddings.

    The tensors are the states, `[rows, channels, height, width]` say, the embedding of the time `[rows, width]`,
    and what else the kind of model calls for (`split_common.diffusion`).
    """

    #: The `Condition` of this job, if it has one, and which of its rows belongs to each row here; -1 for zeros.
    condition: Hash | None
    rows: Annotated[
        list[Annotated[int, msgspec.Meta(ge=-1, lt=MAX_IMAGE_ROWS)]],
        msgspec.Meta(min_length=1, max_length=MAX_IMAGE_ROWS),
    ]
    arrays: Annotated[list[Array], msgspec.Meta(min_length=2, max_length=MAX_ARRAYS)]
    #: How the answer's numbers should travel.
    codec: Codec
    #: All replies below this sequence number have arrived.
    acked: Natural = 0
    #: Bytes of the tensors that the `TensorPart`s before had; the rest follows here.
    sent: Natural = 0

    @property
    def reserved(self) -> int:
        return 128 + 32 * len(self.arrays) + 3 * len(self.rows)

    @property
    def needs(self) -> frozenset[str]:
        return CAPABILITIES.intersection((self.codec, *(array.codec for array in self.arrays)))

    @property
    def step_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def tensor_bytes(self) -> int:
        return max(0, self.step_bytes - self.sent)


class Denoised(Payload, frozen=True, tag=9):
    """Answer to a `Denoise`: the body's output, of which `PART_BYTES` follow here. Times in microseconds."""

    output: Array
    body_us: Natural = 0
    worker_us: Natural = 0

    @property
    def reserved(self) -> int:
        return 96

    @property
    def tensor_bytes(self) -> int:
        return min(PART_BYTES, self.output.nbytes)


class TensorPart(Payload, frozen=True, tag=10):
    """Bytes from `offset` on: of the tensors of the session's next `Denoise`, or in answer to a `PartRequest`."""

    offset: Natural
    size: Annotated[int, msgspec.Meta(ge=1, le=PART_BYTES)]

    @property
    def tensor_bytes(self) -> int:
        return self.size


class PartRequest(Payload, frozen=True, tag=11):
    """Asks for bytes of the output of the session's last `Denoise`."""

    offset: Natural
    size: Annotated[int, msgspec.Meta(ge=1, le=PART_BYTES)]


class Refusal(Payload, frozen=True, tag=6):
    """The request was refused and changed nothing.

    The refusal of a request that the worker did not take into its session travels under the channel's control keys,
    as session 0, and says here which request it means: one of a session that it does not hold, or that found its
    queue "full" and is to be sent again.
    """

    reason: Literal[
        "busy", "full", "non-finite", "malformed", "lost", "failed", "too-long", "evicted", "embeddings"
    ]
    message: Annotated[str, msgspec.Meta(max_length=2048)] = ""
    retry_after: Seconds = 0.0
    session: Natural = 0
    epoch: Natural = 0
    seq: Natural = 0


AnyRequest = Step | Fork | Close | Condition | Denoise | TensorPart | PartRequest
AnyReply = Result | Done | Refusal | Denoised | TensorPart

#: What answers a request unless it is refused.
ANSWERS: dict[type[Payload], type[Payload]] = {
    Step: Result,
    Fork: Done,
    Condition: Done,
    TensorPart: Done,
    Denoise: Denoised,
    PartRequest: TensorPart,
}

_P = TypeVar("_P", bound=Payload)
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
request_decoder = msgspec.msgpack.Decoder(AnyRequest)
reply_decoder = msgspec.msgpack.Decoder(AnyReply)


def padded_size(size: int) -> int:
    """The Padmé size for `size` bytes: at most 12 % larger, leaks O(log log size) bits of it.

    Source: Nikitin et al., "Reducing Metadata Leakage from Encrypted Files and Communication with PURBs", PETS
    2019, algorithm 1.
    """
    if size < 2:
        return size
    exponent = size.bit_length() - 1
    low_bits = exponent - exponent.bit_length()
    mask = (1 << low_bits) - 1
    return (size + mask) & ~mask


def encode_payload(payload: Payload, tensor: bytes | memoryview = b"", *, overhead: int = 0) -> bytes:
    """A body's plaintext, padded so that with `overhead` more bytes (the AEAD tag) it has a Padmé size.

    Raises:
        Oversized: it would exceed `MAX_BODY`.
    """
    head = _encoder.encode(payload)
    size = _LENGTH.size + max(len(head), payload.reserved) + len(tensor) + overhead
    padded = padded_size(size)
    if padded > MAX_BODY:
        raise Oversized(f"body of {padded} bytes (at most {MAX_BODY})")
    padding = padded - overhead - _LENGTH.size - len(head) - len(tensor)
    return b"".join((_LENGTH.pack(len(head)), head, tensor, bytes(padding)))


def decode_payload(body: bytes | memoryview, decoder: msgspec.msgpack.Decoder[_P]) -> tuple[_P, memoryview]:
    """Splits a body's plaintext into its payload and its tensor's bytes (padding dropped).

    Raises:
        Malformed: the bytes are no payload, or end before the tensor that the payload names.
        Oversized: the payload is larger than `MAX_PAYLOAD`.
    """
    if len(body) < _LENGTH.size:
        raise Malformed("truncated payload")
    view = memoryview(body)
    (length,) = _LENGTH.unpack_from(view)
    start = _LENGTH.size + length
    if length > MAX_PAYLOAD:
        raise Oversized(f"payload of {length} bytes (at most {MAX_PAYLOAD})")
    if start > len(body):
        raise Malformed("truncated payload")
    try:
        payload = decoder.decode(view[_LENGTH.size : start])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(f"payload: {error}") from None
    size = payload.tensor_bytes
    if size > len(body) - start:
        raise Malformed(f"payload names a tensor of {size} bytes, {len(body) - start} follow")
    return payload, view[start : start + size]
