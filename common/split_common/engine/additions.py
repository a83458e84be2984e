"""Features that are added between layers, e.g. those of images (DeepStack, https://arxiv.org/abs/2406.04334)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from split_common.engine.layers import LayerRange
from split_common.engine.sequences import TokenRun


@contextlib.contextmanager
def adding(layers: LayerRange, runs: Sequence[TokenRun[Any]]) -> Iterator[None]:
    """Adds what runs say to the output of layers, in the forwards inside.

    A forward's tokens are those of the runs, in this order; after them there may be padding.
    """
    indices = {index for run in runs for index in run.additions}
    with contextlib.ExitStack() as hooks:
        for index in indices:
            parts = [
                run.additions[index] if index in run.additions else torch.zeros_like(run.states) for run in runs
            ]
            hook = _Adding(layers.to_device(torch.cat(parts)))
            # Before the hook that takes the last layer's output.
            handle = layers.stack.slots[index].register_forward_hook(hook, prepend=True)
            hooks.callback(handle.remove)
        yield


class _Adding:
    """A forward hook that adds features `[tokens, width]` to a layer's output `[1, tokens and padding, width]`."""

    def __init__(self, features: torch.Tensor) -> None:
        self._features = features

    def __call__(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        features = self._features.to(states)
        added = states + pad(features, (0, 0, 0, states.shape[1] - len(features)))[None]
        return (added, *output[1:]) if isinstance(output, tuple) else added
