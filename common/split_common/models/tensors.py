"""Hidden states as raw bytes, and back."""

from __future__ import annotations

import re

import torch

from split_common.errors import ConfigError, Malformed, NonFinite
from split_common.protocol.payloads import Dtype

#: The dtypes of hidden states, by their names in messages.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

#: What a worker's device may be, for errors.
_DEVICES = "expected auto, cpu, cuda, one GPU like cuda:0, or several like cuda:0,cuda:1"

#: The largest index of a GPU that torch can name.
MAX_GPU = 127

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> Dtype:
    """The name of a dtype in messages. Raises Malformed for one that cannot be sent."""
    if dtype not in _NAMES:
        raise Malformed(f"hidden states of {dtype} cannot be sent: use float32, bfloat16 or float16")
    return _NAMES[dtype]  # type: ignore[return-value]


def parse_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        ConfigError: torch does not find it.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("torch sees no CUDA device: use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def parse_devices(names: str) -> list[torch.device]:
    """The devices of a worker's body: one as in `parse_device`, one GPU like `cuda:1`, or several with commas.

    Returns:
        Each device once, or the CPU as often as it is named: its ranges are as those of several GPUs.

    Raises:
        ConfigError: a name is not a device, torch does not find it, it is named twice, or a GPU is named beside
            the CPU.
    """
    if "," not in names and ":" not in names:
        if names not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"invalid device {names!r}: {_DEVICES}")
        return [parse_device(names)]
    given = [name.strip() for name in names.split(",")]
    for name in given:
        # torch raises an error of its own, or wraps around, for leading zeros and larger indices.
        number = re.fullmatch(r"cpu|cuda:(0|[1-9]\d{0,2})", name, re.ASCII)
        if number is None or int(number[1] or 0) > MAX_GPU:
            raise ConfigError(f"invalid device {name!r}: {_DEVICES}")
    devices = [torch.device(name) for name in given]
    if len({device.type for device in devices}) > 1:
        raise ConfigError(f"--device {names}: a body is on GPUs or on the CPU, not on both")
    gpus = [device for device in devices if device.type == "cuda"]
    if twice := next((gpu for gpu in gpus if gpus.count(gpu) > 1), None):
        raise ConfigError(f"--device {names} names {twice} twice: a GPU takes one range of layers")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (missing := next((gpu for gpu in gpus if gpu.index >= count), None)) is not None:
        found = ", ".join(f"cuda:{index}" for index in range(count)) or "no CUDA device"
        raise ConfigError(f"--device {names}: torch does not see {missing}, but {found}")
    return devices


def use_gpu(device: torch.device) -> None:
    """Makes a GPU the current one of this thread, for new streams and graphs. Does nothing for the CPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def usual_states(width: int, dtype: torch.dtype) -> torch.Tensor:
    """A hidden state `[width]` of a usual size and mean: what layers do with zeros is up to them."""
    return torch.tensor([1.0, -1.0]).repeat(width)[:width].to(dtype)


def to_bytes(states: torch.Tensor) -> memoryview:
    """The bytes of hidden states `[tokens, width]`, in C order and native byte order (little-endian).

    Raises:
        NonFinite: they hold NaN or infinity.
    """
    check_finite(states)
    return raw_bytes(states)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, in C order and native byte order; none if it has no elements."""
    if not tensor.numel():
        # A view of nothing cannot be cast.
        return memoryview(b"")
    # Made contiguous on its own device, because a GPU does that faster.
    return memoryview(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data).cast("B")


def from_bytes(data: memoryview, dtype: str, tokens: int, width: int) -> torch.Tensor:
    """Hidden states `[tokens, width]` from their bytes, on the host.

    Raises:
        Malformed: the number of bytes does not match the shape.
        NonFinite: they hold NaN or infinity.
    """
    expected = tokens * width * DTYPES[dtype].itemsize
    if len(data) != expected:
        raise Malformed(f"{len(data)} bytes of hidden states, expected {expected}")
    states = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(tokens, width)
    check_finite(states)
    return states


def check_finite(states: torch.Tensor) -> None:
    """Raises NonFinite if a tensor holds NaN or infinity."""
    # Both extremes are NaN if any number is. This takes one pass; `isfinite` over all numbers takes several.
    if states.numel() and not torch.isfinite(torch.stack(torch.aminmax(states))).all():
        raise NonFinite("hidden states hold NaN or infinity")


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of a name; None for "auto".

    Raises:
        ConfigError: there is no dtype of this name.
        Malformed: hidden states of this dtype cannot be sent.
    """
    if isinstance(dtype, torch.dtype):
        dtype_name(dtype)
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise ConfigError(f"invalid dtype {dtype!r}: expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
