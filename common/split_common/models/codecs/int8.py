"""Hidden states in 8 bits a number."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from split_common.models.codecs import groups
from split_common.models.tensors import DTYPES

#: Channels that share a scale.
GROUP = 64


class Int8:
    """Integers from -127 to 127, apart from each token's outliers (a `Codec`)."""

    name = "int8"

    def size(self, dtype: str, tokens: int, width: int) -> int:
        return _layout(tokens, width).size

    def encode(self, states: torch.Tensor) -> bytes:
        numbers, outliers = groups.split_off(states, GROUP)
        integers, scales = groups.quantize(numbers, 127)
        return groups.joined([*outliers, scales, integers.flatten(1)[:, : states.shape[1]]])

    def decode(self, data: memoryview, dtype: str, tokens: int, width: int) -> torch.Tensor:
        layout = _layout(tokens, width)
        if not (parts := groups.separated(data, layout)):
            return torch.empty(tokens, width, dtype=DTYPES[dtype])
        channels, values, scales, integers = parts
        padded = pad(integers.view(torch.int8).view(tokens, width), (0, -width % GROUP))
        return groups.put_back(groups.scaled(padded, scales, layout), channels, values, layout, dtype)


def _layout(tokens: int, width: int) -> groups.Layout:
    return groups.Layout(tokens, width, GROUP, width)
