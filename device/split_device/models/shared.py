"""Copies of a split model that share its tensors, for code that runs some of its layers by itself."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

from split_common.compat.torch import remove_forward_hooks
from split_common.models.layer_stack import LayerStack, PassThrough


def shared_copy(model: Any, kept: Container[int]) -> tuple[Any, LayerStack]:
    """A copy of a split model with the same tensors and only the layers `kept`; and its stack."""
    stack: LayerStack = model.split_parts.stack
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for index, slot in enumerate(stack.slots):
        if index not in kept:
            empty = PassThrough()
            empty.imitate(slot)
            empty.returns_tuple = stack.returns_tuple
            memo[id(slot)] = empty
    copied = copy.deepcopy(model, memo)
    copied_stack: LayerStack = copied.split_parts.stack
    for module in (copied, copied_stack.owner):
        remove_forward_hooks(module)
    return copied, copied_stack
