"""Sizes of a model's head, body and tail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import torch

from split_common.compat.transformers import cached_kinds
from split_common.models.adapters import Adapter, AdapterCheckpoint, layer_of
from split_common.models.layer_stack import find_stack
from split_common.models.loading import ModelSpec
from split_common.models.quantization import QuantizedWeights
from split_common.models.split import Split
from split_common.models.tensors import dtype_name


def quantized_weights(spec: ModelSpec, dtype: torch.dtype | None = None) -> QuantizedWeights | None:
    """A model's quantized weights, run in a dtype; None for the checkpoint's. None if they are not quantized."""
    if spec.quantization is None:
        return None
    stored = spec.checkpoint.nbytes(spec.checkpoint.tensor_names)
    return spec.quantization.weights(stored, dtype_name(dtype or _config_dtype(spec.config)))


def kinds(spec: ModelSpec) -> dict[str, int]:
    """How many layers a model has of each kind, by transformers' names, such as `sliding_attention`."""
    return dict(Counter(layer_kinds(spec)))


def layer_kinds(spec: ModelSpec) -> list[str]:
    """The kind of each layer of a model, as transformers' caches read it from the configuration."""
    config = spec.text_config
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or cached_kinds(config)]
    return kinds + ["full_attention"] * (spec.layers - len(kinds))


class PartSize(msgspec.Struct, frozen=True):
    """The size of one part of a split model. Tied weights count in the part that uses them first."""

    name: str
    layers: str
    parameters: int
    bytes: int
    share: float


class AdapterSize(msgspec.Struct, frozen=True):
    """The size of an adapter's tensors in its files, by the side that loads them."""

    name: str
    highest_rank: int
    device_bytes: int
    worker_bytes: int


def adapter_size(spec: ModelSpec, split: Split, name: str, directory: Path) -> AdapterSize:
    """The size of an adapter of a model. Reads no weights. Raises what `Adapter` raises."""
    checkpoint = AdapterCheckpoint(name, directory, bytes(32))
    adapter = Adapter(name, checkpoint)
    with torch.device("meta"):
        model: Any = spec.model_class(spec.config)
    owner, attribute = find_stack(model, spec.layers)
    slots = getattr(owner, attribute)
    (stack,) = (found for found, module in model.named_modules() if module is slots)
    sizes = {True: 0, False: 0}
    for module, tensors in adapter.modules.items():
        sizes[layer_of(module, stack) in split.body] += checkpoint.nbytes(tensors)
    rank = max(map(adapter.config.rank, adapter.modules), default=0)
    return AdapterSize(name, rank, sizes[False], sizes[True])


def parts(spec: ModelSpec, split: Split, dtype: torch.dtype | None = None) -> list[PartSize]:
    """Sizes of head, body and tail of a model. Reads no weights.

    Args:
        dtype: of the loaded parts; None for the checkpoint's. Quantized layers may run as they are stored.
    """
    itemsize = (dtype or _config_dtype(spec.config)).itemsize
    with torch.device("meta"):
        model: Any = spec.model_class(spec.config)
    model.tie_weights()
    owner, attribute = find_stack(model, spec.layers)
    layer_of = {
        id(parameter): index
        for index, layer in enumerate(getattr(owner, attribute))
        for parameter in layer.parameters()
    }
    as_stored = spec.quantization is not None and not spec.quantization.dequantized
    counts = {"head": 0, "body": 0, "tail": 0}
    sizes = dict(counts)
    after_layers = False
    for parameter in model.parameters():
        index = layer_of.get(id(parameter))
        after_layers = after_layers or index is not None
        name = _part(split, index) if index is not None else "tail" if after_layers else "head"
        counts[name] += parameter.numel()
        if index is None or not as_stored:
            sizes[name] += parameter.numel() * itemsize
    if as_stored:
        for tensor in spec.checkpoint.tensor_names:
            index = spec.layer_of(tensor)
            if index is not None and index < spec.layers:
                sizes[_part(split, index)] += spec.checkpoint.nbytes([tensor])
    ranges = {
        "head": f"0:{split.first}",
        "body": f"{split.first}:{split.last}",
        "tail": f"{split.last}:{split.layers}",
    }
    total = sum(counts.values())
    return [PartSize(name, ranges[name], count, sizes[name], count / total) for name, count in counts.items()]


def _part(split: Split, layer: int) -> str:
    """The part that a layer is in."""
    return "head" if layer < split.first else "body" if layer < split.last else "tail"


def bytes_per_token(spec: ModelSpec, dtype: torch.dtype | None = None) -> int:
    """Bytes of one token's hidden states, which travel to the worker and back."""
    return int(spec.text_config.hidden_size) * (dtype or _config_dtype(spec.config)).itemsize


def _config_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
