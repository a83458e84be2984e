"""Skips calls of the worker, because the body's output changes slowly between denoising steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from split_device.models.compression import check_reuse
from split_device.sessions.images import DenoiserInputs

#: Number of images, or of halves under guidance, whose last call is kept.
MAX_KEPT = 2

#: Selects the inputs to which the output is a residual, as in a transformer.
Base = Callable[[DenoiserInputs], torch.Tensor]


@dataclass(eq=False)
class LastCall:
    """The last call of the body for an image that is being made."""

    about: tuple[torch.Tensor, ...]
    states: torch.Tensor
    #: The output, or the residual if there is a base.
    output: torch.Tensor
    timestep: float
    #: Number of steps that have used the output.
    steps: int = 1


class Reuse:
    """Reuses the body's output at some steps of an image.

    The first step of an image always calls it. A step is the first one if its timestep does not decrease, or if the
    embeddings or the size differ from the previous call's.

    Args:
        reuse: from 1: call the body at every `reuse`-th step. Below 1: whenever its input has changed by more than
            this fraction of its norm since the last call.
        base: selects the inputs to which the output is a residual; None if it is not one.
    """

    def __init__(self, reuse: float, base: Base | None = None) -> None:
        self._reuse = check_reuse(reuse)
        self._base = base
        # The most recently used image comes last.
        self._images: list[LastCall] = []

    def output(
        self, timestep: float, inputs: DenoiserInputs, call: Callable[[DenoiserInputs], torch.Tensor]
    ) -> torch.Tensor:
        """The body's output for a step.

        Args:
            timestep: of the step; it decreases during an image.
            call: calls the body.
        """
        if self._reuse == 1:
            return call(inputs)
        about, states = (*inputs.conditioning, *inputs.about), inputs.tensors[0]
        last = self._take(about, states)
        if last is not None and timestep < last.timestep and not self._is_due(last, states):
            last.steps += 1
            last.timestep = timestep
            self._images.append(last)
            return last.output if self._base is None else self._base(inputs) + last.output
        output = call(inputs)
        more = output if self._base is None else output - self._base(inputs)
        self._images = [*self._images, LastCall(about, states, more, timestep)][-MAX_KEPT:]
        return output

    def _take(self, about: tuple[torch.Tensor, ...], states: torch.Tensor) -> LastCall | None:
        """Removes and returns the last call for an image."""
        for index, last in enumerate(self._images):
            same = last.states.shape == states.shape and len(last.about) == len(about)
            if same and all(map(torch.equal, last.about, about)):
                return self._images.pop(index)
        return None

    def _is_due(self, last: LastCall, states: torch.Tensor) -> bool:
        if self._reuse >= 1:
            return last.steps >= self._reuse
        return bool((states - last.states).norm() > self._reuse * last.states.norm())
