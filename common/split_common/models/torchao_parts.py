"""What a safetensors file says about torchao tensors, which are stored in parts."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct, field


class _TorchaoTensor(Struct):
    data_names: Annotated[tuple[str, ...], Meta(max_length=64)] = field(name="_tensor_data_names", default=())


def torchao_parts(metadata: msgspec.Raw) -> dict[str, tuple[str, str]]:
    """What the metadata of a safetensors file says about parts of torchao tensors, by the parts' names.

    Returns:
        The whole tensor's name and its description, as in the metadata.

    Raises:
        MsgspecError: the metadata are malformed.
    """
    if b'"tensor_names"' not in bytes(metadata):
        return {}
    texts = msgspec.json.decode(metadata, type=dict[str, str])
    parts = {}
    for whole, description in texts.items():
        module, _, name = whole.rpartition(".")
        if module and description.startswith("{"):
            for part in msgspec.json.decode(description, type=_TorchaoTensor).data_names:
                parts[f"{module}._{name}_{part}"] = (whole, description)
    return parts
