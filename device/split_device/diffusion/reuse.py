"""Fewer calls of the worker: the body's output changes slowly from one step of an image to the next."""

from __future__ import annotations

from collections.abc import Callable

import torch

from split_device.diffusion.session import Inputs


class Reuse:
    """Calls the body at every step of a number only, and reuses its output at the steps between.

    An image's first step calls it always: one whose time does not go on downwards, or whose embeddings or size are
    others than before.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._left = 0
        self._timestep = float("-inf")
        self._context: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def output(self, timestep: float, inputs: Inputs, call: Callable[[Inputs], torch.Tensor]) -> torch.Tensor:
        """The body's output for the step at this time."""
        if self._every == 1:
            return call(inputs)
        kept = self._output
        if not self._left or kept is None or not self._goes_on(timestep, inputs, kept):
            kept = self._output = call(inputs)
            self._left = self._every
        self._left -= 1
        self._timestep, self._context = timestep, inputs.context
        return kept

    def _goes_on(self, timestep: float, inputs: Inputs, kept: torch.Tensor) -> bool:
        size = (len(kept), *kept.shape[2:])
        return (
            timestep <= self._timestep
            and size == (len(inputs.sample), *inputs.sample.shape[2:])
            and self._context is not None
            and torch.equal(self._context, inputs.context)
        )
