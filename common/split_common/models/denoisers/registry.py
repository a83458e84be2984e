"""The kinds of denoisers that can be split."""

from __future__ import annotations

from split_common.errors import UnsupportedArchitecture
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.spec import DenoiserSpec
from split_common.models.denoisers.transformer import FluxSpec, SD3Spec
from split_common.models.denoisers.unet import UNetSpec

#: The spec class of each denoiser that can be split, by the name of the denoiser's class in diffusers.
DENOISERS: dict[str, type[DenoiserSpec]] = {kind.class_name: kind for kind in (UNetSpec, SD3Spec, FluxSpec)}


def is_denoiser(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a diffusion model's denoiser."""
    return checkpoint.class_name in DENOISERS


def read_denoiser_spec(checkpoint: Checkpoint) -> DenoiserSpec:
    """Reads the configuration of a denoiser.

    Raises:
        UnsupportedArchitecture: it is not a denoiser that can be split.
        ModelError: config.json is malformed.
    """
    kind = DENOISERS.get(checkpoint.class_name or "")
    if kind is None:
        raise UnsupportedArchitecture(f"{checkpoint.name} is not one of {', '.join(DENOISERS)}")
    spec = kind(checkpoint, checkpoint.config)
    if checkpoint.adapter_names and not isinstance(spec, UNetSpec):
        raise UnsupportedArchitecture(f"{checkpoint.name}: an IP-Adapter of a {kind.class_name} does not run split")
    return spec
