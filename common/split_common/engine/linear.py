"""Linear layers whose weights are laid out for this CPU.

A step of a few rows is bound by reading the weights, yet MKL takes twice as long for two rows as for one. With
weights in its own blocked layout, oneDNN takes hardly longer for sixteen rows than for one.

oneDNN compiles a kernel for each number of rows, which takes a millisecond and half a MiB. Rows are padded to keep
the number of kernels small.
"""

from __future__ import annotations

import logging
from typing import TypeGuard

import psutil
import torch
from torch import nn

from split_common.compat.torch import reorder_linear_weight, reordered_linear

log = logging.getLogger(__name__)

#: Number of rows for which oneDNN chooses the layout. The layout suits one row as well as hundreds.
LAYOUT_ROWS = 64

#: Smallest padded number of rows, and smallest difference of two, because oneDNN is faster for four rows than for
#: one.
LEAST_ROWS = 4

#: Largest error of a layer that is accepted, relative to its largest output.
LINEAR_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

#: Share of the free memory that the copied weights may take.
COPY_SHARE = 0.6


class PackedLinear(nn.Module):
    """Computes the same as an `nn.Linear`, from a copy of its weight in oneDNN's layout.

    Raises:
        RuntimeError: this build of torch, or this CPU, does not support it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self._packed = reorder_linear_weight(linear.weight.detach().contiguous(), LAYOUT_ROWS)

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight `[out, in]` in its ordinary layout."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return reordered_linear(states, self._packed, self.bias)


def padded_rows(rows: int) -> int:
    """The number of rows to compute for `rows` rows: at most a quarter more, except for the first few."""
    step = max(LEAST_ROWS, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


@torch.inference_mode()
def pack_linears(model: nn.Module) -> None:
    """Replaces the linear layers of a model on the CPU, if their output stays the same and memory suffices.

    All parameters are then copies, no longer mapped from the checkpoint's file.
    """
    linears = {module for module in model.modules() if _is_plain(module)}
    if not linears:
        return
    needed = sum(linear.weight.nbytes for linear in linears)
    if needed > COPY_SHARE * psutil.virtual_memory().available:
        log.info("linear layers keep their layout: %d bytes of weights would be copied", needed)
        return
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child in linears:
                    setattr(parent, name, _packed(child))
    except (RuntimeError, AttributeError, KeyError) as error:
        log.info("linear layers keep their layout: %s", error)
        return
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            parameter.data = parameter.data.clone()


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer with torch's own forward and weight, which quantization may replace."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype in LINEAR_TOLERANCE and not weight.is_meta


def _packed(linear: nn.Module) -> nn.Module:
    """A packed layer in place of a linear one. Raises RuntimeError if its output differs."""
    assert isinstance(linear, nn.Linear)
    packed = PackedLinear(linear)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, linear.in_features, generator=generator).to(linear.weight.dtype)
    wanted, got = linear(states), packed(states)
    error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
    if not error < LINEAR_TOLERANCE[linear.weight.dtype]:
        raise RuntimeError(f"a packed layer's output differs by {error:.1e}")
    return packed
