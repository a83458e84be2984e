"""Placeholders of the body's blocks in the device's UNet.

`UNet2DConditionModel.forward` stays as it is. The body's blocks on the way down pass placeholders on, in place of
their skips; the last one on the way up calls the worker with what the first one was handed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from split_common.errors import UnsupportedFeature
from split_device.models.context import CallContext
from split_device.sessions.images import DenoiserInputs


@dataclass
class UNetCall:
    """What the UNet is called with, on its way through the slots."""

    timestep: float
    #: A ControlNet's, for the body's skips and its middle block.
    residuals: Sequence[torch.Tensor] = ()
    #: An IP-Adapter's, one for each of the body's attentions.
    scales: Sequence[float] = ()
    #: What the body's first block is handed, once it has been.
    sample: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    context: Any = None

    def inputs(self) -> DenoiserInputs:
        """What the body is called with. Raises UnsupportedFeature for embeddings that are not a text's."""
        assert self.sample is not None
        assert self.embedding is not None
        text, images = self.context if isinstance(self.context, tuple) else (self.context, [])
        if not isinstance(text, torch.Tensor) or text.ndim != 3:
            raise UnsupportedFeature("a text's embeddings cannot be split unless they are [rows, tokens, width]")
        return DenoiserInputs(
            [self.sample, self.embedding, *self.residuals], [text, *images], self.scales if images else ()
        )


#: The call of a UNet under way.
unet_calls: CallContext[UNetCall] = CallContext("UNet")


def _call() -> UNetCall:
    call = unet_calls.get()
    assert call is not None, "a slot is called by the UNet"
    return call


class Attention(nn.Module):
    """Stands for an attention of the body, so that an IP-Adapter finds it. Its weights are the worker's."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def get_processor(self) -> Any:
        return self.processor

    def set_processor(self, processor: Any) -> None:
        for parameter in processor.parameters() if isinstance(processor, nn.Module) else ():
            parameter.data = parameter.data.new_empty(0)
        self._modules.pop("processor", None)
        self.processor = processor


def outline(module: nn.Module, of: nn.Module) -> nn.Module | None:
    """Gives a module the attentions of another one, under their names; None if it has none."""
    for name, child in of.named_children():
        processor: Any = getattr(child, "get_processor", None)
        made = Attention(processor()) if processor is not None else outline(nn.Module(), child)
        if made is not None:
            module.add_module(name, made)
    return module if next(module.children(), None) is not None else None


class UNetSlot(nn.Module):
    """A block of the body, on the worker. Has no parameters."""

    has_cross_attention = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        outline(self, block)

    @staticmethod
    def refuse(options: dict[str, Any]) -> None:
        """Raises UnsupportedFeature for options of blocks that do not travel to the worker."""
        for name in ("attention_mask", "encoder_attention_mask", "cross_attention_kwargs", "additional_residuals"):
            # A LoRA's scale has been applied already, to the blocks that are here.
            given = options.get(name)
            if given is None or (isinstance(given, dict) and not given.keys() - {"scale"}):
                continue
            raise UnsupportedFeature(f"{name} cannot be split: it concerns blocks that are on the worker")


class DownSlot(UNetSlot):
    """A block on the way down: makes `skips` skips, which are placeholders."""

    def __init__(self, block: nn.Module, skips: int, first: bool) -> None:
        super().__init__(block)
        self._skips, self._first = skips, first

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, encoder_hidden_states: Any = None, **options: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        self.refuse(options)
        if self._first:
            call = _call()
            call.sample, call.embedding, call.context = hidden_states, temb, encoder_hidden_states
        placeholder = hidden_states.new_zeros(())
        return placeholder, (placeholder,) * self._skips


class MiddleSlot(UNetSlot):
    """The block in the middle: passes the placeholder on."""

    def forward(self, hidden_states: torch.Tensor, _embedding: torch.Tensor, **options: Any) -> torch.Tensor:
        self.refuse(options)
        return hidden_states


class UpSlot(UNetSlot):
    """A block on the way up, with as many `resnets` as the skips that it takes."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        # Counted by the UNet.
        self.resnets = nn.ModuleList(nn.Identity() for _ in block.resnets)

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        self.refuse(options)
        return hidden_states


class LastSlot(UpSlot):
    """The body's last block: what it returns comes from the worker, but for its upsampler, which is here.

    Args:
        run: calls the body for the step at this time.
    """

    def __init__(self, block: Any, run: Callable[[float, DenoiserInputs], torch.Tensor]) -> None:
        super().__init__(block)
        self._run = run
        self.upsamplers = block.upsamplers

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        self.refuse(options)
        call = _call()
        output = self._run(call.timestep, call.inputs())
        for upsampler in self.upsamplers:
            output = upsampler(output, options.get("upsample_size"))
        return output
