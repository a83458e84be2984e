"""Linear layers whose weights are laid out for this CPU.

A step of a few rows is bound by reading the weights, yet MKL's product of two rows takes twice as long as that of
one. oneDNN's, over weights in its own blocked layout, takes hardly longer for sixteen than for one.

oneDNN compiles a kernel for each number of rows that it meets, which takes a millisecond and keeps half a MiB: a
forward's rows are padded, so that there are few such numbers.
"""

from __future__ import annotations

import logging

import psutil
import torch
from torch import nn

from split_common.compat.torch import reorder_linear_weight, reordered_linear

log = logging.getLogger(__name__)

#: Rows that the layout is chosen for: it serves one row as well as hundreds.
LAYOUT_ROWS = 64

#: Rows come in multiples of this at least: oneDNN is faster for four than for one.
LEAST_ROWS = 4

#: Largest error that the check of a layer accepts, relative to its largest output.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

#: Share of free memory that the weights, which are copied, may take.
MEMORY_SHARE = 0.6


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` does, from a copy of its weight in oneDNN's layout.

    Raises:
        RuntimeError: this build of torch, or this CPU, cannot.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self._packed = reorder_linear_weight(linear.weight.detach().contiguous(), LAYOUT_ROWS)

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[out, in]` in its ordinary layout, made anew each time."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return reordered_linear(states, self._packed, self.bias)


def padded_rows(rows: int) -> int:
    """How many rows to compute for `rows`: a quarter more at most, beyond the first few."""
    step = max(LEAST_ROWS, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


@torch.inference_mode()
def pack_linears(model: nn.Module) -> None:
    """Replaces the linear layers of a model on the CPU, where that gives the same output and memory allows it.

    Parameters stop being mapped from the checkpoint's file.
    """
    linears = {module for module in model.modules() if type(module) is nn.Linear and not module.weight.is_meta}
    needed = sum(linear.weight.nbytes for linear in linears)
    if needed > MEMORY_SHARE * psutil.virtual_memory().available:
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
        parameter.data = parameter.data.clone()


def _packed(linear: nn.Module) -> nn.Module:
    assert isinstance(linear, nn.Linear)
    packed = PackedLinear(linear)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, linear.in_features, generator=generator).to(linear.weight.dtype)
    wanted, got = linear(states), packed(states)
    error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
    if not error < TOLERANCE[linear.weight.dtype]:
        raise RuntimeError(f"a packed layer's output differs by {error:.1e}")
    return packed
