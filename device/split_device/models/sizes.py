"""How large a model's parts are: what the device keeps, and what the worker runs."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from split_common.models.layer_stack import find_stack
from split_common.models.loading import ModelSpec
from split_common.models.split import Split


class PartSize(msgspec.Struct, frozen=True):
    """One part of a split model. Tied weights count where they are used first."""

    name: str
    layers: str
    parameters: int
    bytes: int
    share: float


def parts(spec: ModelSpec, split: Split, dtype: torch.dtype | None = None) -> list[PartSize]:
    """Head, body and tail of a model; no weight is read.

    Args:
        dtype: that the parts are loaded in; None for the checkpoint's.
    """
    itemsize = (dtype or _config_dtype(spec.config)).itemsize
    with torch.device("meta"):
        model: Any = spec.model_class(spec.config)
    if spec.config.get_text_config(decoder=True).tie_word_embeddings:
        model.tie_weights()
    owner, attribute = find_stack(model, spec.layers)
    layer_of = {
        id(parameter): index
        for index, layer in enumerate(getattr(owner, attribute))
        for parameter in layer.parameters()
    }
    counts = {"head": 0, "body": 0, "tail": 0}
    after_layers = False
    for parameter in model.parameters():
        index = layer_of.get(id(parameter))
        after_layers = after_layers or index is not None
        if index is None:
            name = "tail" if after_layers else "head"
        else:
            name = "head" if index < split.first else "body" if index < split.last else "tail"
        counts[name] += parameter.numel()
    ranges = {
        "head": f"0:{split.first}",
        "body": f"{split.first}:{split.last}",
        "tail": f"{split.last}:{split.layers}",
    }
    total = sum(counts.values())
    return [PartSize(name, ranges[name], count, count * itemsize, count / total) for name, count in counts.items()]


def bytes_per_token(spec: ModelSpec, dtype: torch.dtype | None = None) -> int:
    """Bytes of a token's hidden states, which travel to the worker and back."""
    return int(spec.text_config.hidden_size) * (dtype or _config_dtype(spec.config)).itemsize


def _config_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
