"""What the integer codecs share: outliers of each token, and a scale for each group of its channels.

In language models a few channels of each token's hidden state are far larger than the others, most of all for the
first token ("massive activations", Sun et al., arXiv 2402.17762). One scale for all channels would round the others
to nothing. So each token's largest channels travel apart, in bfloat16, and the rest in groups with a scale each.
Every token has the same number of them, and so the size of a message depends on its number of tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from split_common.errors import Malformed
from split_common.models.tensors import DTYPES, check_finite, raw_bytes

#: Outliers of each token.
OUTLIERS = 4

#: Largest width: an outlier's channel is a number of 16 bits.
MAX_WIDTH = 65536


@dataclass(frozen=True)
class Layout:
    """Bytes of each part of encoded states: channels and values of outliers, scales, integers, in this order."""

    tokens: int
    width: int
    #: Channels that share a scale.
    group: int
    #: Bytes of a token's integers.
    integers: int

    @property
    def groups(self) -> int:
        return -(-self.width // self.group)

    @property
    def outliers(self) -> int:
        return min(OUTLIERS, self.width)

    @property
    def parts(self) -> list[int]:
        each = (2 * self.outliers, 2 * self.outliers, 2 * self.groups, self.integers)
        return [self.tokens * size for size in each]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts)


def split_off(states: torch.Tensor, group: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Takes the outliers off hidden states `[tokens, width]`.

    Returns:
        The states in groups, zero for outliers and padding, float32 `[tokens, groups, group]`; and the outliers'
        channels (int16) and values (bfloat16), both `[tokens, outliers]`.

    Raises:
        NonFinite: the states hold NaN or infinity.
        Malformed: they are wider than `MAX_WIDTH`.
    """
    check_finite(states)
    tokens, width = states.shape
    if width > MAX_WIDTH:
        raise Malformed(f"hidden states of width {width}: the codec takes {MAX_WIDTH} at most")
    numbers = states.detach().to("cpu", torch.float32, copy=True)
    channels, values = [], []
    for _ in range(min(OUTLIERS, width)):
        largest = numbers.abs().argmax(1, keepdim=True)
        channels.append(largest)
        values.append(numbers.gather(1, largest))
        numbers.scatter_(1, largest, 0.0)
    grouped = pad(numbers, (0, -width % group)).view(tokens, -(-width // group), group)
    return grouped, [torch.cat(channels, 1).to(torch.int16), to_bfloat16(torch.cat(values, 1))]


def to_bfloat16(numbers: torch.Tensor) -> torch.Tensor:
    """Rounds finite float32 to the nearest bfloat16 that is finite."""
    most = torch.finfo(torch.bfloat16).max
    return numbers.clamp(-most, most).to(torch.bfloat16)


def quantize(groups: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds groups `[tokens, groups, group]` to integers from `-largest` to `largest`.

    Returns:
        The integers (int8), and the scales (bfloat16), `[tokens, groups]`.
    """
    # A bfloat16 is the upper half of a float32. Rounded up, so that no number exceeds the largest integer.
    scales = (groups.abs().amax(-1) / largest).view(torch.int32)
    scales = ((scales + 0xFFFF) & ~0xFFFF).view(torch.float32)
    rounded = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round_()
    return rounded.clamp_(-largest, largest).to(torch.int8), scales.to(torch.bfloat16)


def joined(parts: list[torch.Tensor]) -> bytes:
    return b"".join(map(raw_bytes, parts))


def separated(data: memoryview, layout: Layout) -> list[torch.Tensor]:
    """The parts of encoded states, uint8. Raises Malformed if their number of bytes does not match the layout."""
    if layout.width > MAX_WIDTH or len(data) != layout.size:
        raise Malformed(f"{len(data)} bytes of encoded states, expected {layout.size}")
    return list(torch.split(torch.frombuffer(bytearray(data), dtype=torch.uint8), layout.parts)) if data else []


def scaled(integers: torch.Tensor, scales: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Undoes `quantize`: float32 `[tokens, groups, group]`.

    Raises:
        Malformed: a scale is negative.
        NonFinite: a scale, or a number, is NaN or infinite.
    """
    factors = scales.view(torch.bfloat16).view(layout.tokens, layout.groups, 1).float()
    check_finite(factors)
    if bool((factors < 0).any()):
        raise Malformed("a scale of encoded states is negative")
    numbers = integers.view(layout.tokens, layout.groups, layout.group).float() * factors
    check_finite(numbers)
    return numbers


def put_back(
    groups: torch.Tensor, channels: torch.Tensor, values: torch.Tensor, layout: Layout, dtype: str
) -> torch.Tensor:
    """Undoes `split_off`: states `[tokens, width]`.

    Raises:
        Malformed: an outlier's channel is not one of the states'.
        NonFinite: an outlier is NaN or infinite.
    """
    shape = (layout.tokens, layout.outliers)
    places = channels.view(torch.int16).view(shape).long() & 0xFFFF
    if bool((places >= layout.width).any()):
        raise Malformed(f"an outlier of encoded states is not among {layout.width} channels")
    outliers = values.view(torch.bfloat16).view(shape).float()
    check_finite(outliers)
    numbers = groups.flatten(1)[:, : layout.width].contiguous()
    numbers.scatter_(1, places, outliers)
    # What is rounded up at the edge of float16's range stays finite.
    most = torch.finfo(DTYPES[dtype]).max
    return numbers.clamp_(-most, most).to(DTYPES[dtype])
