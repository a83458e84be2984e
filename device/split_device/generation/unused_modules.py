"""Leaves out the modules of a model that a call does not use, such as the tower that sees images."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from split_common.models.layer_stack import Absent


def drop_unused(model: nn.Module, call: Callable[[], object]) -> None:
    """Replaces those modules of a model whose parameters a call of it does not use.

    If the call fails without them, all stay.
    """
    used: set[nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda own, _args, _output: used.add(own)) for module in list(model.modules())
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    dropped = _drop(model, used)
    try:
        call()
    except Exception:
        for parent, name, child in dropped:
            setattr(parent, name, child)


def _drop(module: nn.Module, used: set[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replaces the children in which nothing is used. Returns each with its parent and name."""
    dropped: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in list(module.named_children()):
        if not used.isdisjoint(child.modules()):
            dropped += _drop(child, used)
        elif next(child.parameters(), None) is not None:
            setattr(module, name, Absent())
            dropped.append((module, name, child))
    return dropped
