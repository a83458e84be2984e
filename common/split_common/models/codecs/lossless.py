"""Hidden states without a change in any bit: exponents entropy-coded, signs and mantissas as they are.

The exponents of hidden states have an entropy of about 3 bits, of the 8 that float32 and bfloat16 spend on them;
mantissas look random. Huffman codes (deflate without matches, RFC 1951) come within 2 % of that entropy, and zlib
is a part of Python.
"""

from __future__ import annotations

import zlib

import torch

from split_common.errors import Malformed
from split_common.models.tensors import DTYPES, check_finite, raw_bytes

#: Sizes are multiples of this share of the raw size, so that the size hardly depends on the numbers.
STEPS = 8

#: Bytes that deflate may add to what it cannot compress, beside one in 4,096.
_OVERHEAD = 64

#: Integers as wide as a number of each dtype.
_INTEGERS = {2: torch.int16, 4: torch.int32}


class Lossless:
    """Each number, rotated left by one bit, without its first byte; then all first bytes, deflated (a `Codec`).

    The rotation puts the exponent into the first byte (of float16, with the mantissa's first bits) and the sign at
    the end. Zeros follow, to a multiple of an eighth of the raw size.
    """

    name = "lossless"

    def size(self, dtype: str, tokens: int, width: int) -> None:
        return None

    def encode(self, states: torch.Tensor) -> bytes:
        check_finite(states)
        states = states.detach().cpu().contiguous()
        size = states.element_size()
        numbers = states.view(_INTEGERS[size])
        rotated = (numbers << 1) | ((numbers >> (8 * size - 1)) & 1)
        parts = rotated.view(torch.uint8).view(-1, size)
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        encoded = b"".join((raw_bytes(parts[:, :-1]), deflate.compress(raw_bytes(parts[:, -1])), deflate.flush()))
        return encoded + bytes(-len(encoded) % _step(states.nbytes))

    def decode(self, data: memoryview, dtype: str, tokens: int, width: int) -> torch.Tensor:
        size, count = DTYPES[dtype].itemsize, tokens * width
        raw, mantissas = size * count, (size - 1) * count
        if not mantissas <= len(data) <= raw + raw // 4096 + _OVERHEAD + _step(raw):
            raise Malformed(f"{len(data)} bytes of lossless states of {raw} bytes")
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            exponents = inflate.decompress(data[mantissas:], count + 1)
        except zlib.error as error:
            raise Malformed(f"lossless states: {error}") from None
        if len(exponents) != count or not inflate.eof:
            raise Malformed(f"{len(exponents)} exponents of lossless states, expected {count}")
        parts = torch.empty(count, size, dtype=torch.uint8)
        if count:
            parts[:, :-1] = torch.frombuffer(bytearray(data[:mantissas]), dtype=torch.uint8).view(count, size - 1)
            parts[:, -1] = torch.frombuffer(bytearray(exponents), dtype=torch.uint8)
        rotated = parts.view(_INTEGERS[size])
        # The sign that a shift to the right repeats is cleared.
        numbers = ((rotated >> 1) & torch.iinfo(rotated.dtype).max) | (rotated << (8 * size - 1))
        states = numbers.view(DTYPES[dtype]).view(tokens, width)
        check_finite(states)
        return states


def _step(raw: int) -> int:
    return max(1, raw // STEPS)
