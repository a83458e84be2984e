"""What the owner of a model's layers adds between them, e.g. features of images: only the device can do it."""

from __future__ import annotations

from typing import Any

import torch

from split_common.errors import UnsupportedFeature
from split_common.models.layer_stack import LayerStack
from split_common.models.split import Split

#: Arguments of a stack's owner that say nothing that has to travel by itself.
_USUAL = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "use_cache",
    "cache_position",
    "logits_to_keep",
)


def layers_with_features(config: Any) -> int:
    """How many layers, counted from the first, get features of images after them, as configurations say it."""
    for part in (config, getattr(config, "vision_config", None)):
        if (taken_from := getattr(part, "deepstack_visual_indexes", None)) is not None:
            return len(taken_from)
    return 0


def additions(stack: LayerStack, given: dict[str, Any]) -> dict[int, torch.Tensor]:
    """What a call of the owner with these arguments adds after layers, `[batch, tokens, width]`, by their indices.

    Raises:
        UnsupportedArchitecture: what the layers are handed beside hidden states depends on unusual arguments.
    """
    more = {
        name: value
        for name, value in given.items()
        if name not in (*_USUAL, stack.cache_name) and isinstance(value, torch.Tensor | list | tuple)
    }
    if not more or given.get("inputs_embeds") is None:
        return {}
    usual = {name: given.get(name) for name in ("inputs_embeds", "position_ids", "attention_mask")}
    return stack.additions(usual, more)


def check_additions(stack: LayerStack, split: Split, given: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Returns `additions`. Raises UnsupportedFeature if something is added between layers on the worker."""
    found = additions(stack, given)
    inside = [index for index in found if index < split.last - 1]
    if inside and inside[-1] >= split.first:
        raise UnsupportedFeature(
            f"this model adds features of images after layer {inside[-1]}, which is on the worker: give the "
            f"device a head of at least {inside[-1] + 1} layers (head_layers, --layers)"
        )
    return found
