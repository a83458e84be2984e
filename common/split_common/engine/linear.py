"""Linear layers whose weights are laid out for this CPU.

A step of a few rows is bound by reading the weights. With weights in its own blocked layout, oneDNN takes hardly
longer for sixteen rows than for one; with weights as they are stored, some CPUs are faster for one. `tuning.py`
measures which it is. Layers that are handed the same input become one product (`fusion.py`).

oneDNN compiles a kernel for each number of rows, which takes a millisecond and half a MiB. Rows are padded to keep
the number of kernels small.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

import psutil
import torch
from torch import nn
from torch.nn.functional import linear as apply_linear
from torch.nn.functional import pad

from split_common.compat.torch import reorder_linear_weight, reordered_linear
from split_common.engine import native
from split_common.engine.fused_sketch import sketch_layers
from split_common.engine.fusion import become_parts, find_shared, joined, replace_modules, share
from split_common.engine.tuning import LEAST_BYTES, UNMEASURED, Apply, Layout, Product, Tuning, tune
from split_common.models.layer_stack import LayerStack

log = logging.getLogger(__name__)

#: Number of rows for which oneDNN chooses the layout. The layout suits one row as well as hundreds.
LAYOUT_ROWS = 64

#: Largest error of a layer that is accepted, relative to its largest output.
LINEAR_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

#: Share of the free memory that the copied weights may take.
COPY_SHARE = 0.6


class PackedLinear(nn.Module):
    """Computes the same as an `nn.Linear`, from a copy of its weight in oneDNN's layout.

    Args:
        linear: the layer.
        rows: how many rows to compute for a few; others are computed as they are.

    Raises:
        RuntimeError: this build of torch, or this CPU, does not support it.
    """

    def __init__(self, linear: nn.Linear, rows: Mapping[int, int] | None = None) -> None:
        super().__init__()
        self._rows = rows or {}
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self._packed = reorder_linear_weight(linear.weight.detach().contiguous(), LAYOUT_ROWS)

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight `[out, in]` in its ordinary layout."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        count = states.shape[-2] if states.ndim > 1 else 1
        if count not in self._rows or states.ndim == 1:
            return reordered_linear(states, self._packed, self.bias)
        more = pad(states, (0, 0, 0, self._rows[count] - count))
        return reordered_linear(more, self._packed, self.bias)[..., :count, :]


@torch.inference_mode()
def pack_linears(model: nn.Module, stack: LayerStack | None = None, *, measure: bool = True) -> Tuning:
    """Replaces the linear layers of a model on the CPU by what is fastest here, if memory suffices.

    All parameters are then copies, no longer mapped from the checkpoint's file.

    Args:
        model: the model.
        stack: its slots; None if no layers are to be computed together.
        measure: whether to measure what is fastest.

    Returns:
        What was chosen.
    """
    linears = [module for module in model.modules() if is_plain(module)]
    needed = sum(linear.weight.nbytes for linear in linears)
    if not linears or needed > COPY_SHARE * psutil.virtual_memory().available:
        log.info("linear layers keep their layout: %d bytes of weights would be copied", needed)
        return UNMEASURED
    groups = [] if stack is None else find_shared(stack, linears)
    together = {linear for group in groups for linear in group}
    alone = [linear for linear in linears if linear not in together]
    tuning, fused = UNMEASURED, set[nn.Linear]()
    if measure and needed >= LEAST_BYTES:
        sketches = sketch_layers(stack, linears) if stack is not None and native.begin() else {}
        fused = {linear for sketch in sketches.values() for linear in sketch.linears}
        products = [each for each in (*groups, *([linear] for linear in alone)) if not fused.issuperset(each)]
        tuning = replace(_tune(products) if products else UNMEASURED, sketches=sketches)
    shared = share(model, groups)
    for each, group in zip(shared, groups, strict=True):
        each.product = _joined(group, tuning, fused)
    kept = {id(parameter) for each in shared for parameter in each.parameters()}
    replace_modules(model, {linear: _laid_out(linear, tuning) for linear in alone if linear not in fused})
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and id(parameter) not in kept:
            parameter.data = parameter.data.clone()
    return replace(tuning, joined=len(groups))


def _joined(linears: Sequence[nn.Linear], tuning: Tuning, fused: Container[nn.Linear]) -> nn.Module:
    """One layer with the outputs of several. If it is laid out as stored, their weights become parts of its own."""
    whole = joined(linears)
    product = whole if linears[0] in fused else _laid_out(whole, tuning)
    if product is whole:
        become_parts(linears, whole)
    return product


def _tune(products: Sequence[Sequence[nn.Linear]]) -> Tuning:
    """What is fastest for products, each of which computes some layers."""
    kinds: dict[Product, Sequence[nn.Linear]] = {}
    for linears in products:
        outputs = sum(linear.out_features for linear in linears)
        kinds.setdefault(Product(linears[0].in_features, outputs, linears[0].weight.dtype), linears)

    def sample(product: Product) -> torch.Tensor:
        return torch.cat([linear.weight.detach() for linear in kinds[product]])

    return tune(kinds, sample, _apply)


def _apply(weight: torch.Tensor, layout: Layout) -> Apply:
    """Computes rows by a copy of a weight `[out, in]` in some layout."""
    if layout == "plain":
        return lambda states: apply_linear(states, weight)
    packed = reorder_linear_weight(weight, LAYOUT_ROWS)
    return lambda states: reordered_linear(states, packed, None)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer with torch's own forward and weight, which quantization may replace."""
    if type(module) is not nn.Linear or not _runs_its_own_forward(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype in LINEAR_TOLERANCE and not weight.is_meta


def _laid_out(linear: nn.Linear, tuning: Tuning) -> nn.Module:
    """A layer with the layout that was chosen for it; the layer itself if that changes its output, or fails."""
    product = Product(linear.in_features, linear.out_features, linear.weight.dtype)
    if tuning.layout(product) == "plain":
        return linear
    try:
        packed = PackedLinear(linear, tuning.rows.get(product))
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(3, linear.in_features, generator=generator).to(linear.weight.dtype)
        wanted, got = linear(states), packed(states)
    except (RuntimeError, AttributeError, KeyError) as failure:
        log.info("a linear layer keeps its layout: %s", failure)
        return linear
    error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
    if not error < LINEAR_TOLERANCE[linear.weight.dtype]:
        log.info("a linear layer keeps its layout: its output differs by %.1e", error)
        return linear
    return packed


def _runs_its_own_forward(module: nn.Linear) -> bool:
    """Whether calls run `nn.Linear.forward` of this very layer."""
    return getattr(module.forward, "__func__", None) is nn.Linear.forward and module.forward.__self__ is module  # type: ignore[attr-defined]
