"""Placeholders of the body's blocks in the device's UNet.

`UNet2DConditionModel.forward` stays as it is. Slots on the way down return placeholders instead of skips. The last
slot on the way up calls the worker with the inputs of the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from split_common.errors import UnsupportedFeature
from split_device.models.context import CallContext
from split_device.models.stand_ins import OnWorker, outline
from split_device.sessions.images import DenoiserInputs


@dataclass
class UNetCall:
    """The arguments of a UNet's call that its slots need."""

    timestep: float
    #: Residuals of a ControlNet, for the body's skips and its middle block.
    residuals: Sequence[torch.Tensor] = ()
    #: Scales of an IP-Adapter, one for each of the body's attentions.
    scales: Sequence[float] = ()
    #: The inputs of the body's first block; None before its call.
    sample: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    context: Any = None

    def inputs(self) -> DenoiserInputs:
        """The body's inputs. Raises UnsupportedFeature if the embeddings are not those of a text."""
        assert self.sample is not None
        assert self.embedding is not None
        text, images = self.context if isinstance(self.context, tuple) else (self.context, [])
        if not isinstance(text, torch.Tensor) or text.ndim != 3:
            raise UnsupportedFeature("a text's embeddings have to be [rows, tokens, width]")
        return DenoiserInputs(
            [self.sample, self.embedding, *self.residuals], [text, *images], self.scales if images else ()
        )


#: The call of a UNet that is under way.
unet_calls: CallContext[UNetCall] = CallContext("UNet")


def _call() -> UNetCall:
    call = unet_calls.get()
    assert call is not None, "a slot is called by the UNet"
    return call


class UNetSlot(OnWorker):
    """The place of a block that is on the worker. Has stand-ins for its modules, and no parameters."""

    has_cross_attention = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        outline(self, block)

    @staticmethod
    def refuse(options: dict[str, Any]) -> None:
        """Raises UnsupportedFeature for options that concern the blocks on the worker."""
        for name in ("attention_mask", "encoder_attention_mask", "cross_attention_kwargs", "additional_residuals"):
            # The scale of a LoRA is already applied to the blocks on this device.
            given = options.get(name)
            if given is None or (isinstance(given, dict) and not given.keys() - {"scale"}):
                continue
            raise UnsupportedFeature(f"{name} does not run split: it concerns blocks that are on the worker")


class DownSlot(UNetSlot):
    """A block on the way down. Returns `skips` placeholders as its skips."""

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
    """The block in the middle. Returns the placeholder."""

    def forward(self, hidden_states: torch.Tensor, _embedding: torch.Tensor, **options: Any) -> torch.Tensor:
        self.refuse(options)
        return hidden_states


class UpSlot(UNetSlot):
    """A block on the way up. The UNet counts its `resnets`: it has one for each skip that it takes."""

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        self.refuse(options)
        return hidden_states


class LastSlot(UpSlot):
    """The body's last block: returns the worker's output. Its upsampler runs on this device.

    Args:
        run: calls the body, given the timestep and the inputs.
    """

    def __init__(self, block: Any, run: Callable[[float, DenoiserInputs], torch.Tensor]) -> None:
        super().__init__(block)
        self._run = run
        # In place of the stand-ins.
        self.upsamplers = block.upsamplers

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        self.refuse(options)
        call = _call()
        output = self._run(call.timestep, call.inputs())
        for upsampler in self.upsamplers:
            output = upsampler(output, options.get("upsample_size"))
        return output
