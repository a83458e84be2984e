"""The body of a UNet: the blocks of its lower levels, under their own names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from split_common.diffusion.unet import UNetPlan, build_unet, load_weights
from split_common.split import Split


class Middle(nn.Module):
    """Runs a UNet's body. It keeps nothing from one call to the next.

    Args:
        plan: the UNet.
        split: the body's blocks.
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        ModelError: the body cannot be loaded.
    """

    def __init__(self, plan: UNetPlan, split: Split, dtype: torch.dtype | None = None) -> None:
        # Needed where a UNet is loaded only.
        from diffusers import UNet2DConditionModel

        super().__init__()
        unet = build_unet(plan, UNet2DConditionModel)
        first, levels = split.first, plan.levels
        # Names are the original's: no block is renumbered.
        self.down_blocks = nn.ModuleDict({str(index): unet.down_blocks[index] for index in range(first, levels)})
        self.mid_block = unet.mid_block
        self.up_blocks = nn.ModuleDict({str(index): unet.up_blocks[index] for index in range(levels - first)})
        unet.up_blocks[levels - first - 1].upsamplers = None
        load_weights(self, plan, split, "worker", dtype)

    def forward(
        self,
        sample: torch.Tensor,
        embedding: torch.Tensor,
        context: torch.Tensor,
        residuals: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """One call of the body.

        Args:
            sample: what comes out of the last downsampler on the device, `[batch, channels, height, width]`.
            embedding: of the step's time and of the added conditions, `[batch, width]`.
            context: the text's embeddings, `[batch, tokens, width]`.
            residuals: a ControlNet's, one for each of the body's skips (the first is the input's) and one for the
                middle block's output; empty without one.

        Returns:
            The output of the body's last block, before its upsampler.
        """
        skips = [sample]
        for block in self.down_blocks.values():
            sample, made = block(sample, embedding, **_context(block, context))
            skips += made
        if residuals:
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
        if self.mid_block is not None:
            sample = self.mid_block(sample, embedding, **_context(self.mid_block, context))
        if residuals:
            sample = sample + residuals[-1]
        for block in self.up_blocks.values():
            count = len(cast(nn.ModuleList, block.resnets))
            own = skips[-count:]
            del skips[-count:]
            size = _upsampled(sample, skips[-1]) if skips else None
            sample = block(
                hidden_states=sample,
                temb=embedding,
                res_hidden_states_tuple=tuple(own),
                upsample_size=size,
                **_context(block, context),
            )
        return sample


def _context(block: Any, context: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def _upsampled(sample: torch.Tensor, skip: torch.Tensor) -> torch.Size | None:
    """The size that a block's output must have to fit the next skip; None if that is just twice its own."""
    wanted = skip.shape[2:]
    return None if [2 * size for size in sample.shape[2:]] == list(wanted) else wanted
