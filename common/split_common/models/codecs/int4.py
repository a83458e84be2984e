"""Hidden states in 4 bits a number, after a rotation."""

from __future__ import annotations

import torch

from split_common.models.codecs import groups
from split_common.models.tensors import DTYPES, check_finite

#: Channels that share a scale: a power of two.
GROUP = 32


class Int4:
    """Integers from -7 to 7, two in a byte, apart from each token's outliers (a `Codec`).

    Each group is rotated first, by a Hadamard matrix. That spreads what is large over all channels of the group, so
    that fewer of them are rounded to zero (Ashkboos et al., "QuaRot", arXiv 2404.00456).
    """

    name = "int4"

    def size(self, dtype: str, tokens: int, width: int) -> int:
        return _layout(tokens, width).size

    def encode(self, states: torch.Tensor) -> bytes:
        numbers, outliers = groups.split_off(states, GROUP)
        integers, scales = groups.quantize(rotate(numbers), 7)
        nibbles = integers.flatten(1) & 15
        return groups.joined([*outliers, scales, nibbles[:, ::2] | (nibbles[:, 1::2] << 4)])

    def decode(self, data: memoryview, dtype: str, tokens: int, width: int) -> torch.Tensor:
        layout = _layout(tokens, width)
        if not (parts := groups.separated(data, layout)):
            return torch.empty(tokens, width, dtype=DTYPES[dtype])
        channels, values, scales, packed = parts
        nibbles = packed.view(torch.int8)
        # Shifting left and right again extends the sign of the lower four bits.
        integers = torch.stack(((nibbles << 4) >> 4, nibbles >> 4), 1)
        numbers = rotate(groups.scaled(integers, scales, layout))
        check_finite(numbers)
        return groups.put_back(numbers, channels, values, layout, dtype)


def _layout(tokens: int, width: int) -> groups.Layout:
    return groups.Layout(tokens, width, GROUP, -(-width // GROUP) * GROUP // 2)


def rotate(numbers: torch.Tensor) -> torch.Tensor:
    """The Walsh-Hadamard transform of the last dimension, whose size is a power of two. It is its own inverse.

    By additions alone, in a fixed order: the same bits however many rows there are.
    """
    size, half = numbers.shape[-1], 1
    while half < size:
        pairs = numbers.view(*numbers.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        numbers = torch.stack((first + second, first - second), -2).view(numbers.shape)
        half *= 2
    return torch.mul(numbers, size**-0.5)
