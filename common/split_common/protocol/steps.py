"""Steps: what travels of one call of a language model's body; and the base of all payloads.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from split_common.protocol.capabilities import (
    OUTPUTS,
    PADDED_STEPS,
    POSITION_AXES,
    SPANS,
    TREES,
    StatesCodec,
    states_capability,
)
from split_common.protocol.headers import Natural

#: Bytes of a number in each dtype that hidden states may have on the wire.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

Dtype = Literal["float32", "bfloat16", "float16"]

#: Most tokens that attend to each other both ways, which are computed together.
MAX_SPAN = 4096

#: Most tokens of a run that is a tree.
MAX_TREE = 64


class Payload(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of all payloads."""

    @property
    def reserved(self) -> int:
        """Least bytes of the encoded payload, so that a body's size does not reveal the numbers in it."""
        return 64

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors that follow in the body."""
        return 0

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities that its receiver must have."""
        return frozenset()


class Run(msgspec.Struct, array_like=True, frozen=True):
    """A run of tokens to append to one row of a session."""

    row: Annotated[int, msgspec.Meta(ge=0, lt=4096)]
    #: Cache length of the row before the run; the worker truncates the row to it.
    start: Natural
    #: Position of each token, for rotary embeddings; with padding it differs from the index in the cache.
    positions: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]], msgspec.Meta(min_length=1)]


class Step(Payload, frozen=True, tag=1):
    """One call of a language model's body. The tensor is the hidden states of all runs, `[tokens, width]`."""

    dtype: Dtype
    width: Annotated[int, msgspec.Meta(ge=1, lt=2**20)]
    #: The runs, in the order of the hidden states.
    rows: Annotated[list[Run], msgspec.Meta(max_length=4096)]
    #: Before the runs are appended, row i becomes old row `select[i]`. None leaves the rows as they are.
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


class Span(msgspec.Struct, array_like=True, frozen=True):
    """Tokens of a row that attend to each other both ways, as those of an image may. They are part of one run."""

    row: Annotated[int, msgspec.Meta(ge=0, lt=4096)]
    #: Index of the first one in the row.
    start: Natural
    length: Annotated[int, msgspec.Meta(ge=2, le=MAX_SPAN)]


class PlacedStep(Step, frozen=True, tag=13):
    """A `Step` that also says where the tokens of images are."""

    #: For each run the positions on the further axes (height and width of images), one axis after the other; empty
    #: if all axes agree, as for texts.
    axes: Annotated[list[list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]], msgspec.Meta(max_length=4096)] = []
    spans: Annotated[list[Span], msgspec.Meta(max_length=4096)] = []

    @property
    def reserved(self) -> int:
        return super().reserved + 16 * len(self.spans) + sum(3 + 5 * len(axes) for axes in self.axes)

    @property
    def needs(self) -> frozenset[str]:
        asked = {POSITION_AXES: any(self.axes), SPANS: bool(self.spans)}
        return frozenset(name for name, needed in asked.items() if needed)


class CodedStep(PlacedStep, frozen=True, tag=15):
    """A step whose hidden states, `size` bytes, are encoded, and so those of its answer; with images or without."""

    codec: StatesCodec | Literal["exact"] = "lossless"
    size: Natural = 0

    @property
    def reserved(self) -> int:
        return super().reserved + 32

    @property
    def tensor_bytes(self) -> int:
        return self.size

    @property
    def needs(self) -> frozenset[str]:
        return super().needs if self.codec == "exact" else super().needs | {states_capability(self.codec)}


class BriefStep(CodedStep, frozen=True, tag=17):
    """A step, in any codec, of which only some tokens' outputs are wanted."""

    #: The indices of these tokens, in ascending order; none if the outputs of no token are wanted.
    outputs: list[Natural] = []

    @property
    def reserved(self) -> int:
        return super().reserved + 5 * len(self.outputs)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {OUTPUTS}


class PaddedStep(BriefStep, frozen=True, tag=18):
    """A step that is as large as one of `room` tokens, and so is its answer, whatever they hold.

    Padding follows the encoded states: `padded` bytes are both together.
    """

    room: Annotated[int, msgspec.Meta(ge=1, lt=2**20)] = 1
    padded: Natural = 0

    @property
    def pads(self) -> bool:
        """Whether its answer is to be padded."""
        return True

    @property
    def reserved(self) -> int:
        missing = max(0, self.room - self.tokens) + max(0, self.room - len(self.outputs))
        return super().reserved + 5 * missing + 16

    @property
    def tensor_bytes(self) -> int:
        return self.padded

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {PADDED_STEPS}


class TreeStep(PaddedStep, frozen=True, tag=19):
    """A step of which runs may be trees, or come after a tree of which one path stays.

    It is not padded if `padded` is 0.
    """

    #: For each run, the token of the run that each of its tokens follows, -1 for the row's last token before the
    #: run. Empty if each follows the one before it, as in all other steps.
    parents: Annotated[
        list[Annotated[list[Annotated[int, msgspec.Meta(ge=-1, lt=MAX_TREE)]], msgspec.Meta(max_length=MAX_TREE)]],
        msgspec.Meta(max_length=4096),
    ] = []
    #: For each run, the tokens before its start that stay, if others between them do not: ascending indices,
    #: counted from the token at `start` minus their number. The worker drops all others from there on.
    kept: Annotated[
        list[Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_TREE)]], msgspec.Meta(max_length=MAX_TREE)]],
        msgspec.Meta(max_length=4096),
    ] = []

    @property
    def reserved(self) -> int:
        # As if all tokens of a largest tree stayed: how many do is not to show.
        return super().reserved + 3 * max(self.room, self.tokens) + (4 + 2 * MAX_TREE) * max(1, len(self.rows))

    @property
    def pads(self) -> bool:
        return self.padded > 0

    @property
    def tensor_bytes(self) -> int:
        return self.padded or self.size

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {TREES}
