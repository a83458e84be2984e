"""Fewer calls of the worker: the body's output changes slowly from one step of an image to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from split_device.diffusion.saving import check_reuse
from split_device.diffusion.session import Inputs

#: Images, or halves of guided ones, whose last output is kept.
MAX_KEPT = 2

#: What of the inputs the output goes on from: a transformer's blocks add to their input.
Base = Callable[[Inputs], torch.Tensor]


@dataclass(eq=False)
class Kept:
    """An image under way, and the body's last call for it."""

    about: tuple[torch.Tensor, ...]
    states: torch.Tensor
    #: The output; what it adds to its base, if it has one.
    output: torch.Tensor
    timestep: float
    #: Steps that the output served for.
    steps: int = 1


class Reuse:
    """Reuses the body's output at some steps of an image.

    An image's first step always calls it: one whose time does not go on downwards, or whose embeddings or size are
    others than before.

    Args:
        reuse: from 1, call the body at every step of this number; below 1, whenever its input has changed by more
            than this since the last call, in proportion to its norm.
        base: what the output is added to, if to anything.
    """

    def __init__(self, reuse: float, base: Base | None = None) -> None:
        self._reuse = check_reuse(reuse)
        self._base = base
        # The one that was used last comes last.
        self._images: list[Kept] = []

    def output(self, timestep: float, inputs: Inputs, call: Callable[[Inputs], torch.Tensor]) -> torch.Tensor:
        """The body's output for the step at this time."""
        if self._reuse == 1:
            return call(inputs)
        about, states = (*inputs.job, *inputs.about), inputs.tensors[0]
        kept = self._take(about, states)
        if kept is not None and timestep < kept.timestep and not self._is_due(kept, states):
            kept.steps += 1
            kept.timestep = timestep
            self._images.append(kept)
            return kept.output if self._base is None else self._base(inputs) + kept.output
        output = call(inputs)
        more = output if self._base is None else output - self._base(inputs)
        self._images = [*self._images, Kept(about, states, more, timestep)][-MAX_KEPT:]
        return output

    def _take(self, about: tuple[torch.Tensor, ...], states: torch.Tensor) -> Kept | None:
        """Takes out what is kept of an image."""
        for index, kept in enumerate(self._images):
            same = kept.states.shape == states.shape and len(kept.about) == len(about)
            if same and all(map(torch.equal, kept.about, about)):
                return self._images.pop(index)
        return None

    def _is_due(self, kept: Kept, states: torch.Tensor) -> bool:
        if self._reuse >= 1:
            return kept.steps >= self._reuse
        return bool((states - kept.states).norm() > self._reuse * kept.states.norm())
