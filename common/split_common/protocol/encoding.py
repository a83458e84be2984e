"""The plaintext of a message's body: payloads as bytes, padded, and back.

A plaintext is a length (4 bytes, little-endian), a msgspec payload, the raw bytes of the tensors that the payload
names, and padding. `split_common.protocol.channel` seals it; the broker never sees it.

It is untrusted input: decoding checks each length and range, and raises a `ProtocolError`.

Nothing here imports torch.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec

from split_common.errors import Malformed, Oversized
from split_common.protocol import payloads
from split_common.protocol.headers import MAX_BODY

#: Largest msgspec payload of a body, in bytes, without tensors: it bounds what is decoded into objects.
MAX_PAYLOAD = 1024 * 1024

#: Most bytes of Python objects for a byte of a payload: an empty list takes a byte, and as many in memory.
OBJECT_BYTES = 64

_P = TypeVar("_P", bound=payloads.Payload)
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
request_decoder = msgspec.msgpack.Decoder(payloads.AnyRequest)
reply_decoder = msgspec.msgpack.Decoder(payloads.AnyReply)


def padded_size(size: int) -> int:
    """Rounds a size up so that it reveals only O(log log size) bits; at most 12 % larger (Padmé).

    Source: Nikitin et al., "Reducing Metadata Leakage from Encrypted Files and Communication with PURBs", PETS
    2019, algorithm 1.
    """
    if size < 2:
        return size
    exponent = size.bit_length() - 1
    low_bits = exponent - exponent.bit_length()
    mask = (1 << low_bits) - 1
    return (size + mask) & ~mask


def encode_payload(payload: payloads.Payload, tensor: bytes | memoryview = b"", *, overhead: int = 0) -> bytes:
    """Returns a body's plaintext, padded to a Padmé size.

    Args:
        payload: the payload.
        tensor: the bytes of the tensors that it names, one after another.
        overhead: bytes that sealing adds (the AEAD tag); the padded size includes them.

    Raises:
        Oversized: the sealed body would exceed `MAX_BODY`.
    """
    head = _encoder.encode(payload)
    size = _LENGTH.size + max(len(head), payload.reserved) + len(tensor) + overhead
    padded = padded_size(size)
    if padded > MAX_BODY:
        raise Oversized(f"body of {padded} bytes (at most {MAX_BODY})")
    padding = padded - overhead - _LENGTH.size - len(head) - len(tensor)
    return b"".join((_LENGTH.pack(len(head)), head, tensor, bytes(padding)))


def held_bytes(body: bytes | memoryview) -> int:
    """Most bytes that a body's plaintext keeps in memory once decoded: its own, and those of the payload's objects.

    Args:
        body: one that `decode_payload` takes. The tensors' bytes are a view of it, so all of it stays.
    """
    (length,) = _LENGTH.unpack_from(body)
    return len(body) + OBJECT_BYTES * int(length)


def decode_payload(body: bytes | memoryview, decoder: msgspec.msgpack.Decoder[_P]) -> tuple[_P, memoryview]:
    """Splits a body's plaintext into its payload and the bytes of its tensors.

    Args:
        body: the plaintext.
        decoder: `request_decoder` or `reply_decoder`.

    Returns:
        The payload, and a view of the tensors' bytes in `body`, without padding.

    Raises:
        Malformed: the payload cannot be decoded, or the body ends before the tensors that it names.
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
