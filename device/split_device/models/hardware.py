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
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        threads: number of CPU threads that compute; None leaves it to torch.
    """

    device: str = "auto"
    threads: int | None = None

    def use(self) -> torch.device:
        """Sets the number of threads of this process; returns the device. Raises ConfigError if there is none."""
        from split_common.models.tensors import parse_device

        place = parse_device(self.device)
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return place
