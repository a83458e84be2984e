"""Hidden states as they are."""

from __future__ import annotations

import torch

from split_common.models.tensors import DTYPES, from_bytes, to_bytes


class Exact:
    """Raw bytes in C order, little-endian (a `Codec`)."""

    name = "exact"

    def size(self, dtype: str, tokens: int, width: int) -> int:
        return tokens * width * DTYPES[dtype].itemsize

    def encode(self, states: torch.Tensor) -> memoryview:
        return to_bytes(states)

    def decode(self, data: memoryview, dtype: str, tokens: int, width: int) -> torch.Tensor:
        return from_bytes(data, dtype, tokens, width)
