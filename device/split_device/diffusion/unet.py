"""`SplitUNet2DConditionModel`: a diffusion model's UNet whose lower levels run on a worker."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from split_common.diffusion.plan import ImagePlan
from split_common.diffusion.unet import UNetPlan
from split_common.errors import UnsupportedFeature
from split_common.split import Split
from split_device.diffusion.denoiser import SplitDenoiser
from split_device.diffusion.session import Inputs
from split_device.diffusion.slots import Call, DownSlot, LastSlot, MiddleSlot, UpSlot

_SIGNATURE = inspect.signature(UNet2DConditionModel.forward)


class SplitUNet2DConditionModel(SplitDenoiser, UNet2DConditionModel):  # type: ignore[misc]
    """A UNet of diffusers with its body on a worker, for `unet=` of a pipeline. Made by `from_pretrained`."""

    _plan: UNetPlan

    def _cut(self, plan: ImagePlan, split: Split) -> None:
        assert isinstance(plan, UNetPlan)
        self._call = Call()
        levels = plan.levels
        for level in range(split.first, levels):
            self.down_blocks[level] = DownSlot(self._call, plan.skips(level), level == split.first)
        blocks: Any = self
        if blocks.mid_block is not None:
            blocks.mid_block = MiddleSlot(self._call)
        last = levels - split.first - 1
        for index in range(last + 1):
            skips = len(self.up_blocks[index].resnets)
            if index < last:
                self.up_blocks[index] = UpSlot(self._call, skips)
            else:
                self.up_blocks[index] = LastSlot(
                    self._call, skips, self._run_body, self.up_blocks[index].upsamplers
                )

    # --- a step --------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like diffusers'. Raises UnsupportedFeature, before anything is sent, for what cannot be split."""
        given = _SIGNATURE.bind(self, *args, **kwargs).arguments
        if given["sample"].requires_grad:
            raise UnsupportedFeature("gradients do not pass through the worker: use torch.no_grad()")
        if given.get("down_intrablock_additional_residuals") is not None:
            raise UnsupportedFeature("a T2I-Adapter cannot be split: it concerns blocks that are on the worker")
        self._call.timestep = float(torch.as_tensor(given["timestep"]).max())
        self._call.residuals = self._residuals(
            given["sample"],
            given.get("down_block_additional_residuals"),
            given.get("mid_block_additional_residual"),
        )
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._call.sample = self._call.embedding = self._call.context = None
            self._call.residuals = ()

    def _residuals(self, sample: torch.Tensor, down: Any, middle: Any) -> list[torch.Tensor]:
        """A ControlNet's residuals for the body. Raises UnsupportedFeature when they do not fit the UNet."""
        if down is None and middle is None:
            return []
        if down is None or middle is None:
            raise UnsupportedFeature("residuals of a ControlNet come for all blocks, or it is none")
        height, width = sample.shape[2:]
        own = 1
        for level in range(self.split.first):
            height, width = (height + 1) // 2, (width + 1) // 2
            own += self._plan.skips(level)
        residuals = [*down[own - 1 :], middle]
        wanted = [(len(sample), *shape) for shape in self._plan.skip_shapes(self.split, height, width)]
        if (found := [tuple(residual.shape) for residual in residuals]) != wanted:
            raise UnsupportedFeature(f"the ControlNet is of another size: residuals {found}, not {wanted}")
        return residuals

    def _run_body(self, inputs: Inputs) -> torch.Tensor:
        return self._run(self._call.timestep, inputs)

    # --- what is refused by name ---------------------------------------------------------------------------

    def load_attn_procs(self, *_args: Any, **_options: Any) -> None:
        """Refused: attention processors with weights belong to the worker's blocks as well."""
        raise UnsupportedFeature("attention processors with weights cannot be split: most are on the worker")

    def _load_ip_adapter_weights(self, *_args: Any, **_options: Any) -> None:
        raise UnsupportedFeature("an IP-Adapter cannot be split: most of its weights belong to the worker's blocks")

    def enable_freeu(self, *_args: Any, **_options: Any) -> None:
        """Refused: it changes blocks that are on the worker."""
        raise UnsupportedFeature("FreeU cannot be split: it changes blocks that are on the worker")
