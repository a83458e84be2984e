"""The small real model of the demo, under its public name: `ensure_demo_model`."""

from split_common.models.demo_model import ensure_demo_model

__all__ = ["ensure_demo_model"]
