"""The split denoiser that a pipeline calls for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.registry import read_denoiser_spec
from split_device.models.denoiser import SplitDenoiser
from split_device.models.transformer import SplitFluxTransformer2DModel, SplitSD3Transformer2DModel
from split_device.models.unet import SplitUNet2DConditionModel

#: By the name of the original's class in diffusers.
CLASSES: dict[str, type[SplitDenoiser]] = {
    "UNet2DConditionModel": SplitUNet2DConditionModel,
    "SD3Transformer2DModel": SplitSD3Transformer2DModel,
    "FluxTransformer2DModel": SplitFluxTransformer2DModel,
}


def load_denoiser(path: str | Path, **options: Any) -> SplitDenoiser:
    """The denoiser of a pipeline, split. Options and errors are those of its class's `from_pretrained`."""
    return CLASSES[read_denoiser_spec(Checkpoint.resolve(path)).class_name].from_pretrained(path, **options)
