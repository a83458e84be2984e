"""A whole language model on this device, none of whose layers are on a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from split_common.models.layer_stack import LayerStack
from split_common.models.loading import load_part, read_spec
from split_common.models.split import Uncut
from split_device.models.traits import Traits, attends


@dataclass(frozen=True)
class WholeParts:
    """The parts of a whole model, for code that runs its layers by itself; as `SplitParts`."""

    stack: LayerStack
    traits: Traits


def load_whole(name: str, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Loads all layers of a language model, with a `WholeParts` as `split_parts`.

    It needs no manifest: no peer has a part of it.

    Args:
        name: a directory or hub id of a safetensors checkpoint, or a GGUF file.
        dtype: of its parameters and states; None keeps the checkpoint's.
        device: where it computes.

    Raises:
        UnknownModel, UnsupportedArchitecture, MissingTensor, ModelError: it cannot be loaded; the message has the
            reason.
    """
    spec = read_spec(name)
    model, stack = load_part(spec, Uncut(spec.layers), "device", dtype=dtype)
    model.name_or_path = model.config.name_or_path = name
    traits = Traits(not stack.takes_positions, stack.positions_interact, attends(spec.text_config))
    model.split_parts = WholeParts(stack, traits)
    return model.to(device)
