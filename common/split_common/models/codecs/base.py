"""The interface of a codec of hidden states."""

from __future__ import annotations

from typing import Protocol

import torch


class Codec(Protocol):
    """Encodes hidden states `[tokens, width]`, and decodes them. Stateless; any thread may use it."""

    #: As options and payloads call it.
    name: str

    def size(self, dtype: str, tokens: int, width: int) -> int | None:
        """Bytes of encoded states of this dtype and shape; None if their number depends on the states."""

    def encode(self, states: torch.Tensor) -> bytes | memoryview:
        """Encodes hidden states `[tokens, width]` of any device, in float32, bfloat16 or float16.

        Raises:
            NonFinite: they hold NaN or infinity.
            Malformed: their width cannot be encoded.
        """

    def decode(self, data: memoryview, dtype: str, tokens: int, width: int) -> torch.Tensor:
        """Decodes hidden states `[tokens, width]`, on the host. The bytes may be hostile.

        Args:
            data: what `encode` made.
            dtype: of the states, by its name in messages.
            tokens, width: their shape. The number of bytes is checked against it before memory is allocated.

        Raises:
            Malformed: the bytes do not fit the shape, or are not what `encode` makes.
            NonFinite: they hold NaN or infinity.
        """
