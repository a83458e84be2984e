"""Finds the tensors of the decoder's layers in a checkpoint, whose names may differ from the model's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from split_common.compat.transformers import names_in_model
from split_common.errors import UnsupportedArchitecture
from split_common.models.layer_stack import find_stack

#: The name of a tensor in an outermost stack of modules: the stack's name, and the index in the stack.
LAYER = re.compile(r"(?P<prefix>[^\d.]\w*(?:\.[^\d.]\w*)*)\.(?P<index>\d+)\.", re.ASCII)


def find_prefix(model: Any, names: Iterable[str], layers: int) -> str:
    """What precedes a decoder layer's index in the names of a checkpoint's tensors.

    Args:
        model: of the checkpoint's class; its tensors may be on the meta device.
        names: of the checkpoint's tensors.
        layers: the number of decoder layers.

    Raises:
        UnsupportedArchitecture: the model has no stack of layers, or it is not clear which tensors belong to it.
    """
    owner, attribute = find_stack(model, layers)
    stack = getattr(owner, attribute)
    path = next(name for name, module in model.named_modules() if module is stack)
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := LAYER.match(name):
            found.setdefault(match["prefix"], {}).setdefault(int(match["index"]), name)
    every = set(range(layers))
    stacks = {prefix: tensors for prefix, tensors in found.items() if tensors.keys() & every}
    samples = {prefix: tensors[min(tensors)] for prefix, tensors in stacks.items()}
    renamed = names_in_model(model, samples.values())
    candidates = (
        [prefix for prefix, name in samples.items() if renamed[name].startswith(f"{path}.")]
        or [prefix for prefix in stacks if prefix.rpartition(".")[2] == attribute]
        or [prefix for prefix, tensors in stacks.items() if tensors.keys() >= every]
    )
    if len(candidates) != 1:
        kind = f"several stacks of layers ({', '.join(candidates)})" if candidates else "no layer of the stack"
        raise UnsupportedArchitecture(f"{model.config.model_type}: the checkpoint has {kind}")
    return candidates[0]
