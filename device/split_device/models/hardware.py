"""On what a device computes its own layers. Needs no torch before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hardware:
    """Where this process computes its part of models.

    Args:
        device: "cpu", "cuda", or "auto": images on a GPU if there is one, head and tail of a language model on the
            CPU, because they have not been tried on a GPU yet.
        threads: number of CPU threads that compute; None leaves it to torch.
    """

    device: str = "auto"
    threads: int | None = None

    def use(self, auto: str = "auto") -> torch.device:
        """Sets the number of threads of this process; returns the device.

        Args:
            auto: what "auto" stands for.

        Raises:
            ConfigError: there is no such device.
        """
        from split_common.models.tensors import parse_device

        place = parse_device(auto if self.device == "auto" else self.device)
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return place
