"""The kinds of denoisers that can be split."""

from __future__ import annotations

from split_common.errors import UnsupportedArchitecture
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.spec import ImagePlan
from split_common.models.denoisers.transformer import FluxPlan, SD3Plan
from split_common.models.denoisers.unet import UNetPlan

#: Denoisers that can be split, by the name of their class in diffusers.
KINDS: dict[str, type[ImagePlan]] = {plan.class_name: plan for plan in (UNetPlan, SD3Plan, FluxPlan)}


def is_denoiser(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a diffusion model's denoiser."""
    return checkpoint.class_name in KINDS


def plan_image(checkpoint: Checkpoint) -> ImagePlan:
    """Reads the configuration of a denoiser.

    Raises:
        UnsupportedArchitecture: it is not a denoiser that can be split.
        ModelError: config.json is malformed.
    """
    kind = KINDS.get(checkpoint.class_name or "")
    if kind is None:
        raise UnsupportedArchitecture(f"{checkpoint.name} is not one of {', '.join(KINDS)}")
    plan = kind(checkpoint, checkpoint.config)
    if checkpoint.adapter_names and not isinstance(plan, UNetPlan):
        raise UnsupportedArchitecture(f"{checkpoint.name}: an IP-Adapter of a {kind.class_name} cannot be split")
    return plan
