"""The device's side of lambda-split: `from split_device import SplitModelForCausalLM, Device`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from split_device.jobs.device import Device
    from split_device.model import SplitModelForCausalLM

__all__ = ["Device", "SplitModelForCausalLM"]


def __getattr__(name: str) -> Any:
    # Loaded when they are asked for: the command line's help needs no torch.
    if name == "SplitModelForCausalLM":
        from split_device.model import SplitModelForCausalLM

        return SplitModelForCausalLM
    if name == "Device":
        from split_device.jobs.device import Device

        return Device
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
