"""A contiguous range of a model's layers, from hidden states to hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from split_common.engine.rotary import isolate_rotary
from split_common.engine.tuning import UNMEASURED, Tuning
from split_common.models.layer_stack import LayerStack, floating_parameter
from split_common.models.split import Split


class LayerRange:
    """Runs the layers `[split.first, split.last)` of a model by transformers' own forward.

    Hooks replace the first layer's input by the hidden states, and take the last layer's output. Slots outside the
    range pass their input through. Not thread-safe: one thread computes.

    Args:
        stack: the slots of a loaded model.
        split: the range.
        width: of the hidden states.
        tuning: says how many rows to compute on the CPU.
    """

    def __init__(self, stack: LayerStack, split: Split, width: int, tuning: Tuning = UNMEASURED) -> None:
        self.stack, self.split, self.width, self.tuning = stack, split, width, tuning
        #: The module that calls the layers.
        self.owner: Any = stack.owner
        parameter = floating_parameter(self.owner)
        #: The device of the first layer. On the CPU, packed linear layers may leave no parameter.
        self.device: torch.device = parameter.device if parameter is not None else torch.device("cpu")
        #: The dtype that all layers compute in.
        self.dtype: torch.dtype = parameter.dtype if parameter is not None else stack.dtype
        #: Whether a forward that was launched runs while the host does other work.
        self.asynchronous = self.device.type == "cuda"
        self._incoming: torch.Tensor | None = None
        self._outgoing: torch.Tensor | None = None
        stack.slots[split.first].register_forward_pre_hook(self._inject)
        stack.slots[split.last - 1].register_forward_hook(self._capture)
        isolate_rotary(self.owner)

    @property
    def modules(self) -> list[nn.Module]:
        """The layers of the range."""
        return list(self.stack.slots[self.split.first : self.split.last])

    @property
    def devices(self) -> list[torch.device]:
        """The device of each layer of the range."""
        parameters = map(floating_parameter, self.modules)
        return [self.device if parameter is None else parameter.device for parameter in parameters]

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor of the host to the first layer's device, without waiting for the copy."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.asynchronous else tensor

    def forward(self, states: torch.Tensor, positions: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The last layer's output `[tokens, width]`.

        Args:
            states: `[tokens, width]`, of any dtype, on the first layer's device.
            positions: rotary positions, int64 `[1, tokens]` or `[axes, 1, tokens]`, on the same device.
            arguments: further arguments of the model's forward, such as its cache.
        """
        self._incoming = states[None].to(self.dtype)
        if self.stack.takes_positions:
            arguments["position_ids"] = positions
        # The other side has the embeddings. Zeros stand in for them until `_inject` replaces them.
        self.owner(inputs_embeds=torch.zeros_like(self._incoming), **arguments)
        output, self._incoming, self._outgoing = self._outgoing, None, None
        assert output is not None
        return output[0]

    def _inject(self, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._incoming, *args[1:])

    def _capture(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self._outgoing = output[0] if isinstance(output, tuple) else output
