"""What is private in torch. Written against 2.13."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.nn.modules import module as modules_of_torch

#: What `torch.nn.attention.varlen.varlen_attn` calls. In torch 2.11 only this takes the lengths of sequences whose
#: keys are not contiguous. Written against torch 2.11 to 2.13; if it breaks, look at
#: `torch/nn/attention/varlen.py`, and at `_flash_attention_forward` in ATen's `native_functions.yaml`.
flash_attention_forward: Any = torch.ops.aten._flash_attention_forward


def reorder_linear_weight(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The weight `[out, in]` of a linear layer, in the layout that oneDNN prefers for inputs of `rows` rows.

    Raises:
        RuntimeError, AttributeError: this build of torch, or this CPU, does not support it.

    Written against torch 2.13. If it breaks, look at `torch/_inductor/fx_passes/mkldnn_fusion.py`, which calls it.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def reordered_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Applies a linear layer, with a weight that `reorder_linear_weight` made, to states `[..., in]`.

    Written against torch 2.13. If it breaks, look at `torch/_inductor/mkldnn_ir.py`, which calls it.
    """
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return output


def compile_in_this_process() -> None:
    """Makes `torch.compile` compile in this process. By default it starts a process for each core, and keeps them.

    Written against torch 2.13. If it breaks, look at `compile_threads` in `torch/_inductor/config.py`.
    """
    inductor.compile_threads = 1


def inductor_cache_default() -> str:
    """The directory where `torch.compile` keeps compiled code unless another is set: under `/tmp`.

    Written against torch 2.13. If it breaks, look at `torch/_inductor/runtime/cache_dir_utils.py`.
    """
    return default_cache_dir()


def twin_with(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A copy of a module that shares all but one of its children, and has no hooks for its forward.

    Written against torch 2.13. If it breaks, look at `Module.__setstate__` in `nn/modules/module.py`.
    """
    twin = copy.copy(module)
    twin._modules = {**module._modules, name: child}
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin


def fingerprint(modules: Iterable[nn.Module]) -> list[object]:
    """What changes if one of some modules gets a hook, another forward or child, or if a parameter is changed.

    Written against torch 2.13. If it breaks, look at `Module._call_impl` in `torch/nn/modules/module.py`, and at
    `Tensor._version`.
    """
    found: list[object] = []
    for module in modules:
        for each in module.modules():
            hooked = len(each._forward_hooks) + len(each._forward_pre_hooks)
            found += (id(each), hooked, id(vars(each).get("forward")), each.training)
            for parameter in each._parameters.values():
                if parameter is not None:
                    version = 0 if parameter.is_inference() else parameter._version
                    found += (id(parameter), version, parameter.requires_grad)
    return found


def has_global_hooks() -> bool:
    """Whether there are hooks that run at calls of all modules.

    Written against torch 2.13. If it breaks, look at `Module._call_impl` in `torch/nn/modules/module.py`.
    """
    return bool(
        modules_of_torch._global_forward_hooks
        or modules_of_torch._global_forward_pre_hooks
        or modules_of_torch._global_backward_hooks
        or modules_of_torch._global_backward_pre_hooks
    )


def remove_forward_hooks(module: nn.Module) -> None:
    """Removes all hooks of a module's forward. Those of its children stay.

    Written against torch 2.13. If it breaks, look at `Module.__init__` in `torch/nn/modules/module.py`.
    """
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()
