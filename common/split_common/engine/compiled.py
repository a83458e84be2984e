"""Layers compiled by torch.compile: what lies between two matrix products becomes one kernel.

A decoding step on a GPU reads each weight once, which takes microseconds a product; normalization, rotation and
activation, a dozen small kernels each, would take as long again. All layers of a kind share the compiled code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from split_common.compat.torch import compile_in_this_process
from split_common.engine.attention import NAME, packed_attention

#: Of one token: its product with a matrix becomes a kernel of its own, together with what is before and after it,
#: and kernels are tuned on the device that they run on.
ONE_TOKEN: dict[str, str | int | bool | Callable[..., Any]] = {"coordinate_descent_tuning": True}


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Has layers compiled when they are next called: once for one token, and once for any other number."""
    compile_in_this_process()
    # What finds its batch through a context variable is not looked into.
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))  # type: ignore[no-untyped-call]
    for layer in layers:
        layer.forward = _compiled(layer.forward)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    one = torch.compile(forward, dynamic=True, options=ONE_TOKEN)
    many = torch.compile(forward, dynamic=True)

    @functools.wraps(forward)
    def compiled(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (one if hidden.shape[1] == 1 else many)(hidden, *args, **kwargs)

    return compiled


def forget_compiled(layers: Sequence[nn.Module]) -> None:
    """Undoes `compile_layers`."""
    AttentionInterface.register(NAME, packed_attention)
    for layer in layers:
        vars(layer).pop("forward", None)
