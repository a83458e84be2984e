"""An image's tensors in a message's body: their encoding, their shape, and how many bytes they take.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

#: Encoding of an image's tensors: floats, or integers with one fp32 scale for each channel of each row.
Codec = Literal["float32", "bfloat16", "float16", "int8", "int4"]

#: Bits of a number in each codec, and bytes of a scale of the integer codecs.
CODEC_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
SCALE_BYTES = 4


class Array(msgspec.Struct, array_like=True, frozen=True):
    """One of the tensors of a body. Scales, `[rows, channels]` in fp32, come before the numbers."""

    codec: Codec
    #: Rows and channels first.
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=1, lt=2**20)]], msgspec.Meta(min_length=2, max_length=4)]
    #: Memory layout at the sender. The receiver restores it, since convolutions round differently in another one.
    #: The numbers travel in C order.
    channels_last: bool = False

    @property
    def size(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def scales(self) -> int:
        """Scales before the numbers; 0 for float codecs."""
        return self.shape[0] * self.shape[1] if self.codec in ("int8", "int4") else 0

    @property
    def nbytes(self) -> int:
        """Bytes of scales and numbers."""
        return (self.size * CODEC_BITS[self.codec] + 7) // 8 + self.scales * SCALE_BYTES
