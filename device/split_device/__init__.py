"""The device's side of lambda-split: models, denoisers and jobs that run in two places."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from split_device.batching.generation import Request
    from split_device.batching.generator import Generator
    from split_device.batching.limits import Limits
    from split_device.diffusion.settings import ImageSettings
    from split_device.diffusion.transformer import SplitFluxTransformer2DModel, SplitSD3Transformer2DModel
    from split_device.diffusion.unet import SplitUNet2DConditionModel
    from split_device.jobs.device import Device, ImageDevice
    from split_device.model import SplitModelForCausalLM
    from split_device.sessions.connection import Connection
    from split_device.settings import Sampling

__all__ = [
    "Connection",
    "Device",
    "Generator",
    "ImageDevice",
    "ImageSettings",
    "Limits",
    "Request",
    "Sampling",
    "SplitFluxTransformer2DModel",
    "SplitModelForCausalLM",
    "SplitSD3Transformer2DModel",
    "SplitUNet2DConditionModel",
]

_MODULES = {
    "Connection": "split_device.sessions.connection",
    "Device": "split_device.jobs.device",
    "Generator": "split_device.batching.generator",
    "ImageDevice": "split_device.jobs.device",
    "ImageSettings": "split_device.diffusion.settings",
    "Limits": "split_device.batching.limits",
    "Request": "split_device.batching.generation",
    "Sampling": "split_device.settings",
    "SplitFluxTransformer2DModel": "split_device.diffusion.transformer",
    "SplitModelForCausalLM": "split_device.model",
    "SplitSD3Transformer2DModel": "split_device.diffusion.transformer",
    "SplitUNet2DConditionModel": "split_device.diffusion.unet",
}


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: the command line's help needs no torch, a language model no diffusers.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
