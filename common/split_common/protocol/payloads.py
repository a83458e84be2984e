"""Payloads: what a message's body holds once it is decrypted, for texts and for images.

`split_common.protocol.encoding` turns them into bytes and back. They travel as arrays, so the order of fields and
the tags are the format; the names of classes and fields are not.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from split_common.protocol.arrays import CODEC_BITS as CODEC_BITS
from split_common.protocol.arrays import SCALE_BYTES as SCALE_BYTES
from split_common.protocol.arrays import Array as Array
from split_common.protocol.arrays import Codec as Codec
from split_common.protocol.capabilities import CAPABILITIES, KEEP, StatesCodec
from split_common.protocol.headers import Hash, Natural, Seconds, SessionRef
from split_common.protocol.steps import DTYPES as DTYPES
from split_common.protocol.steps import MAX_SPAN as MAX_SPAN
from split_common.protocol.steps import MAX_TREE as MAX_TREE
from split_common.protocol.steps import BriefStep as BriefStep
from split_common.protocol.steps import CodedStep as CodedStep
from split_common.protocol.steps import Dtype as Dtype
from split_common.protocol.steps import PaddedStep as PaddedStep
from split_common.protocol.steps import Payload as Payload
from split_common.protocol.steps import PlacedStep as PlacedStep
from split_common.protocol.steps import Run as Run
from split_common.protocol.steps import Span as Span
from split_common.protocol.steps import Step as Step
from split_common.protocol.steps import TreeStep as TreeStep

#: Most rows (images and their negatives) and most tensors of one step of an image.
MAX_IMAGE_ROWS = 256
MAX_ARRAYS = 64

#: Most bytes of the tensors of one step of an image or of its answer, and most of them in one message.
MAX_STEP = 512 * 1024**2
PART_BYTES = 4 * 1024**2

#: Most IP-Adapter scales of an image.
MAX_SCALES = 4096


class Fork(Payload, frozen=True, tag=2):
    """Opens the session as a copy of another session on the same channel."""

    parent: SessionRef
    parent_epoch: Natural

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"fork"})


class UseAdapter(Payload, frozen=True, tag=12):
    """Opens the session with an adapter that its worker has loaded; copies of the session have it, too."""

    #: What the device calls it, for messages.
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    #: The root of the adapter's manifest, by which the worker knows it.
    root: Hash

    @property
    def reserved(self) -> int:
        return 256

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"adapters"})


class Close(Payload, frozen=True, tag=3):
    """Frees the session. It is not answered."""


class Keep(Payload, frozen=True, tag=14):
    """The device has finished with the session, but may copy it. It is not answered.

    A session that is kept gives way before any other. It then ends without a word: a copy of it is refused.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({KEEP})


class Result(Payload, frozen=True, tag=4):
    """Answer to a `Step`. The tensor is the body's output, `[tokens, width]`, of the tokens that it asks for."""

    dtype: Dtype
    tokens: Natural
    width: Annotated[int, msgspec.Meta(ge=1, lt=2**20)]
    #: Microseconds in the body, and elsewhere in the worker's process.
    body_us: Natural = 0
    worker_us: Natural = 0

    @property
    def tensor_bytes(self) -> int:
        return self.tokens * self.width * DTYPES[self.dtype]


class CodedResult(Result, frozen=True, tag=16):
    """Answer to a step whose hidden states are encoded, in its codec."""

    codec: StatesCodec = "lossless"
    size: Natural = 0

    @property
    def tensor_bytes(self) -> int:
        return self.size


class Done(Payload, frozen=True, tag=5):
    """Answer to a request without output; on session 0, the worker's confirmation of a channel's set-up."""


class Conditioning(Payload, frozen=True, tag=7):
    """The conditioning of an image, e.g. the prompt's embeddings `[rows, tokens, width]`. Sent once for each image.

    A worker may drop it. It then refuses steps that name it, with the reason "embeddings".
    """

    #: Digest of the other fields and the tensors, by which steps name it.
    key: Hash
    arrays: Annotated[list[Array], msgspec.Meta(min_length=1, max_length=MAX_ARRAYS)]
    #: Weight of each of the body's attentions to the images of an IP-Adapter.
    scales: Annotated[list[float], msgspec.Meta(max_length=MAX_SCALES)] = msgspec.field(default_factory=list)

    @property
    def tensor_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Denoise(Payload, frozen=True, tag=8):
    """One call of a denoiser's body. Apart from its `Conditioning` it needs nothing that the worker holds.

    The tensors are the states, e.g. `[rows, channels, height, width]`, the timestep's embedding `[rows, width]`,
    and further ones for some kinds of models (`split_common.models.denoisers`).
    """

    #: Key of the image's `Conditioning`, if it has one, and its row for each row of the step; -1 for zeros.
    condition: Hash | None
    rows: Annotated[
        list[Annotated[int, msgspec.Meta(ge=-1, lt=MAX_IMAGE_ROWS)]],
        msgspec.Meta(min_length=1, max_length=MAX_IMAGE_ROWS),
    ]
    arrays: Annotated[list[Array], msgspec.Meta(min_length=2, max_length=MAX_ARRAYS)]
    #: Encoding of the answer.
    codec: Codec
    #: All replies below this sequence number have arrived.
    acked: Natural = 0
    #: Bytes of the tensors that were sent before, in `TensorPart`s; the rest follows in this body.
    sent: Natural = 0

    @property
    def reserved(self) -> int:
        return 128 + 32 * len(self.arrays) + 3 * len(self.rows)

    @property
    def needs(self) -> frozenset[str]:
        return CAPABILITIES.intersection((self.codec, *(array.codec for array in self.arrays)))

    @property
    def step_bytes(self) -> int:
        """Bytes of all tensors of the step."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def tensor_bytes(self) -> int:
        return max(0, self.step_bytes - self.sent)


class Denoised(Payload, frozen=True, tag=9):
    """Answer to a `Denoise`: the output, of which the first `PART_BYTES` follow in this message."""

    output: Array
    #: Microseconds in the body, and elsewhere in the worker's process.
    body_us: Natural = 0
    worker_us: Natural = 0

    @property
    def reserved(self) -> int:
        return 96

    @property
    def tensor_bytes(self) -> int:
        return min(PART_BYTES, self.output.nbytes)


class TensorPart(Payload, frozen=True, tag=10):
    """Some bytes of the tensors of the session's next `Denoise`, or of the output of the last one."""

    offset: Natural
    size: Annotated[int, msgspec.Meta(ge=1, le=PART_BYTES)]

    @property
    def tensor_bytes(self) -> int:
        return self.size


class PartRequest(Payload, frozen=True, tag=11):
    """Asks for some bytes of the output of the session's last `Denoise`."""

    offset: Natural
    size: Annotated[int, msgspec.Meta(ge=1, le=PART_BYTES)]


class Refusal(Payload, frozen=True, tag=6):
    """A request was refused and changed nothing.

    If the worker does not hold the request's session, or did not take the request into it, the refusal travels
    under the channel's own keys, as session 0. `session`, `epoch` and `seq` then say which request it means. One
    that was refused as "full" is to be sent again after `retry_after` seconds.
    """

    reason: Literal[
        "busy",
        "full",
        "non-finite",
        "malformed",
        "lost",
        "failed",
        "too-long",
        "evicted",
        "embeddings",
        "adapter",
    ]
    message: Annotated[str, msgspec.Meta(max_length=2048)] = ""
    retry_after: Seconds = 0.0
    session: SessionRef = 0
    epoch: Natural = 0
    seq: Natural = 0


AnyTextRequest = (
    Step | PlacedStep | CodedStep | BriefStep | PaddedStep | TreeStep | Fork | UseAdapter | Close | Keep
)
AnyRequest = AnyTextRequest | Conditioning | Denoise | TensorPart | PartRequest
AnyReply = Result | CodedResult | Done | Refusal | Denoised | TensorPart

#: The type of the answer to each type of request, unless it is refused.
ANSWERS: dict[type[Payload], type[Payload]] = {
    Step: Result,
    PlacedStep: Result,
    CodedStep: CodedResult,
    BriefStep: Result,
    PaddedStep: Result,
    TreeStep: Result,
    Fork: Done,
    UseAdapter: Done,
    Conditioning: Done,
    TensorPart: Done,
    Denoise: Denoised,
    PartRequest: TensorPart,
}
