"""Codecs of image states: floats, or integers with one float32 scale per channel of each row."""

from __future__ import annotations

import torch

from split_common.errors import Malformed
from split_common.models.tensors import DTYPES, check_finite, dtype_name, raw_bytes
from split_common.protocol import payloads

#: The largest integer of each codec that has scales.
_LARGEST = {"int8": 127, "int4": 7}


def encode(tensor: torch.Tensor, codec: payloads.Codec | None = None) -> tuple[payloads.Array, bytes | memoryview]:
    """Encodes a tensor `[rows, channels, …]` on the device that holds it.

    Args:
        codec: None keeps the tensor's dtype.

    Raises:
        NonFinite: the tensor holds NaN or infinity, or would in this codec.
        Malformed: its dtype cannot be sent.
    """
    codec = codec or dtype_name(tensor.dtype)
    array = payloads.Array(codec, list(tensor.shape), _is_channels_last(tensor))
    if codec in DTYPES:
        tensor = tensor.to(DTYPES[codec])
        check_finite(tensor)
        return array, raw_bytes(tensor)
    check_finite(tensor)
    numbers = tensor.detach().float()
    channels = numbers.flatten(2) if numbers.ndim > 2 else numbers[..., None]
    largest = _LARGEST[codec]
    scales = channels.abs().amax(2, keepdim=True) / largest
    rounded = (channels / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-largest, largest)
    integers = rounded.to(torch.int8).flatten()
    if codec == "int4":
        integers = torch.nn.functional.pad(integers, (0, integers.numel() % 2)) & 15
        integers = integers[::2] | (integers[1::2] << 4)
    return array, b"".join((raw_bytes(scales), raw_bytes(integers)))


def decode(array: payloads.Array, data: memoryview, device: torch.device | None = None) -> torch.Tensor:
    """Decodes a tensor to its original memory layout; float32 for codecs with scales.

    Args:
        device: the device of the result; None for the CPU.

    Raises:
        Malformed: the number of bytes does not match the shape, or a scale is negative.
        NonFinite: the tensor or its scales hold NaN or infinity.
    """
    if len(data) != array.nbytes:
        raise Malformed(f"{len(data)} bytes of a tensor, expected {array.nbytes}")
    if array.codec in DTYPES:
        return _restored(_moved(data, DTYPES[array.codec], device), array)
    border = array.scales * payloads.SCALE_BYTES
    scales = _moved(data[:border], torch.float32, device)
    check_finite(scales)
    if bool((scales < 0).any()):
        raise Malformed("a tensor's scales are negative")
    integers = _moved(data[border:], torch.int8, device)
    if array.codec == "int4":
        # Shifting left and right again extends the sign of the lower four bits.
        integers = torch.stack(((integers << 4) >> 4, integers >> 4), 1).flatten()[: array.size]
    return _restored(integers.view(array.scales, -1).float() * scales[:, None], array)


def _moved(data: memoryview, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return (
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _restored(numbers: torch.Tensor, array: payloads.Array) -> torch.Tensor:
    tensor = numbers.view(array.shape)
    check_finite(tensor)
    last = array.channels_last and tensor.ndim == 4
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor
