"""What is private in diffusers. Written against 0.42."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class ChecksAdapter(ABC):
    """A base class beside `UNet2DConditionModel`: checks an IP-Adapter's weights before a pipeline loads them.

    Written against diffusers 0.42. If it breaks, look at what `IPAdapterMixin.load_ip_adapter` in
    `loaders/ip_adapter.py` calls, and at that method of `UNet2DConditionLoadersMixin` in `loaders/unet.py`.
    """

    @abstractmethod
    def check_adapters(self, states: list[Any]) -> None:
        """Raises an error if the weights must not be loaded.

        Args:
            states: the parts of each IP-Adapter, `image_proj` and `ip_adapter`: tensors by their names.
        """

    def _load_ip_adapter_weights(self, state_dicts: Any, **options: Any) -> None:
        states = state_dicts if isinstance(state_dicts, list) else [state_dicts]
        self.check_adapters(states)
        super()._load_ip_adapter_weights(states, **options)  # type: ignore[misc]
