"""The device's side of lambda-split: models, denoisers and jobs that run in two places."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from split_device.generation.generator import Generator
    from split_device.generation.limits import Limits
    from split_device.generation.request import Request
    from split_device.generation.settings import Sampling
    from split_device.images.settings import ImageSettings
    from split_device.models.language import SplitModelForCausalLM, SplitModelForImageTextToText
    from split_device.models.transformer import SplitFluxTransformer2DModel, SplitSD3Transformer2DModel
    from split_device.models.unet import SplitUNet2DConditionModel
    from split_device.sessions.connection import Connection
    from split_device.submission.submit import Device, ImageDevice

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
    "SplitModelForImageTextToText",
    "SplitSD3Transformer2DModel",
    "SplitUNet2DConditionModel",
]

_MODULES = {
    "Connection": "split_device.sessions.connection",
    "Device": "split_device.submission.submit",
    "Generator": "split_device.generation.generator",
    "ImageDevice": "split_device.submission.submit",
    "ImageSettings": "split_device.images.settings",
    "Limits": "split_device.generation.limits",
    "Request": "split_device.generation.request",
    "Sampling": "split_device.generation.settings",
    "SplitFluxTransformer2DModel": "split_device.models.transformer",
    "SplitModelForCausalLM": "split_device.models.language",
    "SplitModelForImageTextToText": "split_device.models.language",
    "SplitSD3Transformer2DModel": "split_device.models.transformer",
    "SplitUNet2DConditionModel": "split_device.models.unet",
}


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: the command line's help needs no torch, a language model no diffusers.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
