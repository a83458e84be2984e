"""Finds out whether layers are of the usual shape, which one call can compute (`fused_layers.py`).

No architecture is named. A run over random states shows which linear layers are called in which order, with whose
output, and what the modules between them compute. What follows from that is a guess, which only the comparison of
outputs confirms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from split_common.engine.rotary import PerSequenceRotary
from split_common.models.layer_stack import LayerStack, PassThrough, floating_parameter

log = logging.getLogger(__name__)

#: Tokens of the run.
TOKENS = 3

#: Largest error with which an activation or a norm is recognized, relative to the largest number.
RECOGNIZED = 1e-4

#: Activations by their number in `fused.cpp`.
ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    functional.silu,
    functional.gelu,
    lambda states: functional.gelu(states, approximate="tanh"),
    functional.relu,
)

#: How far an estimate may be from a module's own number, relative to it.
NEARLY = 1e-2

#: Scales of the states that show what a norm adds to the mean square: one that hides it, and one that does not.
LARGE, SMALL = 1e3, 1e-3


class OtherShape(Exception):
    """A layer is of another shape. The message says what differs."""


@dataclass(frozen=True)
class Part:
    """Outputs `[begin, end)` of a linear layer."""

    linear: nn.Linear
    begin: int
    end: int

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight.data[self.begin : self.end]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.linear.bias is None else self.linear.bias.data[self.begin : self.end]


@dataclass(frozen=True)
class Norm:
    """A root mean square norm: states over the root of their mean square and `epsilon`, times the weight."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True)
class Sketch:
    """A layer: norm, queries, keys and values, attention, output; norm, gate and up, activation, down."""

    norms: tuple[Norm, Norm]
    #: Of queries and of keys, by heads; None if there are none.
    head_norms: tuple[Norm, Norm] | None
    #: Linear layers with queries, keys and values in this order: one or three.
    projections: tuple[nn.Linear, ...]
    output: nn.Linear
    gate: Part
    up: Part
    down: nn.Linear
    #: An index of `ACTIVATIONS`.
    activation: int

    @property
    def linears(self) -> list[nn.Linear]:
        return [*self.projections, self.output, self.gate.linear, self.up.linear, self.down]


@dataclass
class _Call:
    """A call of a module: its first argument, and its output."""

    module: nn.Module
    states: torch.Tensor
    output: torch.Tensor


def sketch_layers(stack: LayerStack, linears: Iterable[nn.Linear]) -> dict[int, Sketch]:
    """The layers of a stack by index; empty if one is of another shape. Runs the stack.

    Args:
        stack: of a loaded model, with some layers of its own.
        linears: linear layers that compute what torch's do.
    """
    parameter = floating_parameter(stack.owner)
    if parameter is None or parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return {}
    if stack.positions_interact or any(isinstance(each, PerSequenceRotary) for each in stack.owner.modules()):
        return {}
    plain = set(linears)
    try:
        return {
            index: _sketch(slot, calls, plain)
            for index, (slot, calls) in _watch(stack).items()
            if not isinstance(slot, PassThrough)
        }
    except OtherShape as reason:
        log.info("layers are not fused: %s", reason)
    except Exception as error:
        # Why layers cannot run is said by `check_layers`, which runs them as they will be run.
        log.info("layers are not fused: %s", error)
    return {}


@torch.inference_mode()
def _watch(stack: LayerStack) -> dict[int, tuple[nn.Module, list[_Call]]]:
    """Each slot with the calls of its modules, in a run of the stack's owner without a cache."""
    watched: dict[int, tuple[nn.Module, list[_Call]]] = {}
    hooks = []
    for index, slot in enumerate(stack.slots):
        calls: list[_Call] = []
        watched[index] = slot, calls
        for module in slot.modules():
            if module is not slot:
                hooks.append(module.register_forward_hook(_note(calls)))
    arguments = {"position_ids": torch.arange(TOKENS, device="cpu")[None]} if stack.takes_positions else {}
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, TOKENS, stack.width, generator=generator, dtype=torch.float32, device="cpu")
    try:
        stack.owner(inputs_embeds=states, use_cache=False, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return watched


def _note(calls: list[_Call]) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            calls.append(_Call(module, args[0], output))

    return note


def _sketch(layer: nn.Module, calls: Sequence[_Call], plain: set[nn.Linear]) -> Sketch:
    """What a layer is, by the calls of its modules. Raises OtherShape."""
    groups: list[list[_Call]] = []
    for call in calls:
        if isinstance(call.module, nn.Linear):
            if call.module not in plain:
                raise OtherShape("a linear layer is not torch's own")
            if groups and groups[-1][0].states is call.states:
                groups[-1].append(call)
            else:
                groups.append([call])
    if [len(group) for group in groups] not in ([3, 1, 2, 1], [1, 1, 2, 1], [1, 1, 1, 1], [3, 1, 1, 1]):
        raise OtherShape(f"its linear layers are called {[len(group) for group in groups]} at a time")
    (projections, (output,), gated, (down,)) = groups
    norms = [_before(group[0].states, calls) for group in (projections, gated)]
    inner = down.states.shape[-1]
    gate, up = _halves([_linear(call) for call in gated], inner)
    ahead, behind = torch.tensor_split(torch.cat([call.output for call in gated], -1), 2, -1)
    own = [call for call in calls if _is_norm(call) and all(call is not norm for norm in norms)]
    order = [id(call) for call in calls]
    between = range(order.index(id(projections[0])), order.index(id(output)))
    if len(own) not in (0, 2) or any(order.index(id(call)) not in between for call in own):
        raise OtherShape("it has norms elsewhere")
    sketch = Sketch(
        (_norm(norms[0].module, norms[0]), _norm(norms[1].module, norms[1])),
        (_norm(own[0].module, own[0]), _norm(own[1].module, own[1])) if own else None,
        tuple(_linear(call) for call in projections),
        _linear(output),
        gate,
        up,
        _linear(down),
        _activation(ahead, behind, down.states),
    )
    modules = {*sketch.linears, *(call.module for call in (*norms, *own))}
    used = {id(parameter) for module in modules for parameter in module.parameters()}
    if any(id(parameter) not in used for parameter in layer.parameters()):
        raise OtherShape("it has parameters beside those of the usual shape")
    return sketch


def _linear(call: _Call) -> nn.Linear:
    assert isinstance(call.module, nn.Linear)
    return call.module


def _halves(linears: Sequence[nn.Linear], inner: int) -> tuple[Part, Part]:
    """Gate and up, of two linear layers or of one. Raises OtherShape."""
    if sum(linear.out_features for linear in linears) != 2 * inner:
        raise OtherShape("its MLP has no gate")
    if len(linears) == 1:
        return Part(linears[0], 0, inner), Part(linears[0], inner, 2 * inner)
    if linears[0].out_features != inner:
        raise OtherShape("its MLP has no gate")
    return Part(linears[0], 0, inner), Part(linears[1], 0, inner)


def _before(states: torch.Tensor, calls: Sequence[_Call]) -> _Call:
    """The call of a norm whose output is a tensor. Raises OtherShape."""
    for call in calls:
        if call.output is states and not isinstance(call.module, nn.Linear):
            return call
    raise OtherShape("no norm comes before its linear layers")


def _is_norm(call: _Call) -> bool:
    """Whether a call is of a module with parameters of its own that is no linear layer."""
    return any(True for _ in call.module.parameters(recurse=False)) and not isinstance(call.module, nn.Linear)


@torch.inference_mode()
def _norm(module: nn.Module, call: _Call) -> Norm:
    """The norm that a module computes. Raises OtherShape if it is none."""
    width = call.states.shape[-1]
    ones = call.states.new_ones(1, 1, width)
    weight = module(LARGE * ones).flatten().clone()
    if weight.shape != (width,) or not bool(weight.abs().max() > 0):
        raise OtherShape("a norm is not one of the root mean square")
    most = int(weight.abs().argmax())
    ratio = float(SMALL * weight[most] / module(SMALL * ones).flatten()[most])
    norm = Norm(weight, _exactly(max(0.0, ratio**2 - SMALL**2), module))
    states = call.states.float()
    wanted = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + norm.epsilon) * weight
    if not _same(call.output, wanted):
        raise OtherShape("a norm is not one of the root mean square")
    return norm


def _exactly(estimate: float, module: nn.Module) -> float:
    """The number that a module has and that is nearly an estimate; else the estimate."""
    own = (value for value in vars(module).values() if isinstance(value, float))
    return next((value for value in own if abs(value - estimate) <= NEARLY * value), estimate)


def _activation(gate: torch.Tensor, up: torch.Tensor, wanted: torch.Tensor) -> int:
    for index, activation in enumerate(ACTIVATIONS):
        if _same(activation(gate) * up, wanted):
            return index
    raise OtherShape("its MLP has another activation")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= RECOGNIZED * other.abs().max())
