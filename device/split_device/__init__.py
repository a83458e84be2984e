"""The device's side of lambda-split: `SplitModelForCausalLM`, and `SplitUNet2DConditionModel` for images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from split_device.diffusion.unet import SplitUNet2DConditionModel
    from split_device.model import SplitModelForCausalLM

__all__ = ["SplitModelForCausalLM", "SplitUNet2DConditionModel"]

_MODULES = {
    "SplitModelForCausalLM": "split_device.model",
    "SplitUNet2DConditionModel": "split_device.diffusion.unet",
}


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: the command line's help needs no torch, a language model no diffusers.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
