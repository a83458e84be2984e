"""The device's side of lambda-split: `from split_device import SplitModelForCausalLM`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from split_device.model import SplitModelForCausalLM

__all__ = ["SplitModelForCausalLM"]


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: the command line's help needs no torch.
    if name in __all__:
        from split_device.model import SplitModelForCausalLM

        return SplitModelForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
