"""Layers compiled by torch.compile: the operations between two matrix products become one kernel.

A decoding step on a GPU reads each weight once, which takes microseconds per product. Without compilation, the
dozens of small kernels of normalization, rotation and activation take as long again. Layers of one class share the
compiled code.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from split_common.compat.torch import compile_in_this_process, inductor_cache_default
from split_common.engine.attention import ATTENTION_NAME, packed_attention
from split_common.system.files import private_cache

#: Options of inductor for forwards of one token: matrix products are fused with the operations around them, and
#: kernels are tuned on the device that they run on.
ONE_TOKEN: dict[str, str | int | bool | Callable[..., Any]] = {"coordinate_descent_tuning": True}


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compiles layers at their next calls: once for one token, and once for any other number of tokens."""
    compile_in_this_process()
    keep_code_private()
    # It reads a context variable, which torch.compile cannot trace.
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(packed_attention))  # type: ignore[no-untyped-call]
    for layer in layers:
        layer.forward = _compiled(layer.forward)


def keep_code_private() -> None:
    """Makes torch and Triton keep compiled code where no other user can exchange it, unless a place is configured.

    By default they load code from a directory under `/tmp`, whoever has made it.
    """
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        # torch sets the first one itself once it has looked for the directory.
        if os.environ.get(variable, inductor_cache_default()) == inductor_cache_default():
            os.environ[variable] = str(private_cache(name))


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    one = torch.compile(forward, dynamic=True, options=ONE_TOKEN)
    many = torch.compile(forward, dynamic=True)

    @functools.wraps(forward)
    def compiled(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (one if hidden.shape[1] == 1 else many)(hidden, *args, **kwargs)

    return compiled


def forget_compiled(layers: Sequence[nn.Module]) -> None:
    """Undoes `compile_layers`."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    for layer in layers:
        vars(layer).pop("forward", None)
