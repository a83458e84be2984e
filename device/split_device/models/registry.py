"""The split class of each denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.registry import read_denoiser_spec
from split_device.models.denoiser import SplitDenoiser
from split_device.models.transformer import SplitFluxTransformer2DModel, SplitSD3Transformer2DModel
from split_device.models.unet import SplitUNet2DConditionModel

#: Split classes by the name of the original class in diffusers.
CLASSES: dict[str, type[SplitDenoiser]] = {
    "UNet2DConditionModel": SplitUNet2DConditionModel,
    "SD3Transformer2DModel": SplitSD3Transformer2DModel,
    "FluxTransformer2DModel": SplitFluxTransformer2DModel,
}


def load_denoiser(path: str | Path, **options: Any) -> SplitDenoiser:
    """Loads the split denoiser of a pipeline. Options and errors: see `SplitDenoiser.from_pretrained`."""
    return CLASSES[read_denoiser_spec(Checkpoint.resolve(path)).class_name].from_pretrained(path, **options)
