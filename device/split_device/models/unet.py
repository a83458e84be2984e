"""`SplitUNet2DConditionModel`: a diffusion model's UNet whose lower levels run on a worker."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from split_common.compat.diffusers import ChecksAdapter
from split_common.errors import UnsupportedFeature
from split_common.models.denoisers.spec import DenoiserSpec
from split_common.models.denoisers.unet import UNetSpec
from split_common.models.split import Split
from split_common.models.weights import read_tensors
from split_device.models.connected import refuse_gradients
from split_device.models.denoiser import SplitDenoiser, arguments
from split_device.models.placeholders import DownSlot, LastSlot, MiddleSlot, UNetCall, UpSlot, unet_calls

_SIGNATURE = inspect.signature(UNet2DConditionModel.forward)


class SplitUNet2DConditionModel(SplitDenoiser, ChecksAdapter, UNet2DConditionModel):  # type: ignore[misc]
    """A UNet of diffusers with its body on a worker, for `unet=` of a pipeline. Made by `from_pretrained`."""

    _spec: UNetSpec

    def _cut(self, spec: DenoiserSpec, split: Split) -> None:
        assert isinstance(spec, UNetSpec)
        for level in range(split.first, spec.levels):
            block = self.down_blocks[level]
            self.down_blocks[level] = DownSlot(block, spec.skips(level), level == split.first)
        blocks: Any = self
        if blocks.mid_block is not None:
            blocks.mid_block = MiddleSlot(blocks.mid_block)
        last = spec.levels - split.first - 1
        for index in range(last):
            self.up_blocks[index] = UpSlot(self.up_blocks[index])
        self.up_blocks[last] = LastSlot(self.up_blocks[last], self._run)

    # --- a step --------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Works like diffusers'.

        Raises:
            UnsupportedFeature: an argument does not run split; nothing was sent.
            SplitError: the worker or the queue failed.
        """
        given = arguments(_SIGNATURE, self, *args, **kwargs)
        self.check_process()
        refuse_gradients(given["sample"])
        if given.get("down_intrablock_additional_residuals") is not None:
            raise UnsupportedFeature("a T2I-Adapter does not run split: it concerns blocks that are on the worker")
        call = UNetCall(
            float(torch.as_tensor(given["timestep"]).max()),
            self._residuals(
                given["sample"],
                given.get("down_block_additional_residuals"),
                given.get("mid_block_additional_residual"),
            ),
            self._scales() if self._spec.adapted else (),
        )
        with unet_calls.entered(call):
            return super().forward(*args, **kwargs)

    def _residuals(self, sample: torch.Tensor, down: Any, middle: Any) -> list[torch.Tensor]:
        """A ControlNet's residuals for the body. Raises UnsupportedFeature if they do not fit the UNet."""
        if down is None and middle is None:
            return []
        if down is None or middle is None:
            raise UnsupportedFeature("a ControlNet must give residuals for all blocks, the middle one included")
        height, width = sample.shape[2:]
        own = 1
        for level in range(self.split.first):
            height, width = (height + 1) // 2, (width + 1) // 2
            own += self._spec.skips(level)
        residuals = [*down[own - 1 :], middle]
        wanted = [(len(sample), *shape) for shape in self._spec.skip_shapes(self.split, height, width)]
        if (found := [tuple(residual.shape) for residual in residuals]) != wanted:
            raise UnsupportedFeature(f"the ControlNet is of another size: residuals {found}, not {wanted}")
        return residuals

    # --- an IP-Adapter -------------------------------------------------------------------------------------

    def check_adapters(self, states: list[Any]) -> None:
        """Raises UnsupportedFeature if this is not the IP-Adapter with which the model was opened."""
        given = {
            f"{part}.{name}": tensor
            for state in states
            for part, tensors in state.items()
            for name, tensor in tensors.items()
        }
        names = self._spec.checkpoint.adapter_names
        if not names or len(states) != 1 or given.keys() != names:
            raise UnsupportedFeature(
                "most of an IP-Adapter's weights are the worker's: open the model with ip_adapter=FILE, run its "
                "workers with --ip-adapter FILE, and load that one alone"
            )
        if strange := sorted(name for name in names if "_lora." in name):
            raise UnsupportedFeature(f"an IP-Adapter with a LoRA does not run split: {strange[0]}")
        own = read_tensors(self._spec.checkpoint, sorted(names))
        if different := sorted(name for name in names if not torch.equal(given[name].cpu(), own[name])):
            raise UnsupportedFeature(f"{different[0]} is not that of the IP-Adapter that the model was opened with")

    def _scales(self) -> list[float]:
        """The IP-Adapter's scale for each of the body's attentions.

        Raises:
            UnsupportedFeature: a scale differs between images.
        """
        scales = []
        for name in self._spec.body_attentions(self.split):
            (scale,) = getattr(self.get_submodule(name).get_processor(), "scale", [0.0])
            if not isinstance(scale, float | int):
                raise UnsupportedFeature(
                    "scales of single images of an IP-Adapter do not run split: set one for all"
                )
            scales.append(float(scale))
        return scales

    # --- what is refused by name ---------------------------------------------------------------------------

    def load_attn_procs(self, *_args: Any, **_options: Any) -> None:
        """Refused: most attention processors belong to blocks that are on the worker."""
        raise UnsupportedFeature("attention processors with weights do not run split: most are on the worker")

    def enable_freeu(self, *_args: Any, **_options: Any) -> None:
        """Refused: it changes blocks that are on the worker."""
        raise UnsupportedFeature("FreeU does not run split: it changes blocks that are on the worker")
