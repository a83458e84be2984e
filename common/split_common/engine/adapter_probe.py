"""Finds out whether rows with different adapters can share a forward: each output must be that of its row alone."""

from __future__ import annotations

import torch

from split_common.engine.probe import TOLERANCE
from split_common.engine.runner import Runner
from split_common.engine.sequences import TokenRun
from split_common.errors import UnsupportedFeature

#: Tokens of the rows that are tried: two of different lengths, and one that has no adapter.
_COUNTS = (5, 1, 3)


def check_adapters(runner: Runner, adapters: int) -> None:
    """Runs rows with and without adapters together, and each alone.

    Args:
        runner: of layers with adapters.
        adapters: how many adapters they have.

    Raises:
        UnsupportedFeature: the rows' outputs differ.
    """
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(count, runner.width, generator=generator) for count in _COUNTS]
    for number in range(adapters):
        rows = [number, (number + 1) % adapters, None]
        try:
            together = _run(runner, list(zip(states, rows, strict=True)))
            alone = [_run(runner, [row])[0] for row in zip(states, rows, strict=True)]
        except Exception as error:
            raise UnsupportedFeature(f"{runner.layers.stack.name} cannot run adapters: {error}") from None
        differs = max(
            float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
            for got, wanted in zip(together, alone, strict=True)
        )
        if not differs < TOLERANCE[runner.dtype]:
            raise UnsupportedFeature(
                f"{runner.layers.stack.name} cannot run adapters: rows that share a forward differ by {differs:.1e}"
            )


def _run(runner: Runner, rows: list[tuple[torch.Tensor, int | None]]) -> list[torch.Tensor]:
    """The output of new sequences, one for each row's states `[tokens, width]` and adapter."""
    sequences = [runner.store.new_sequence() for _ in rows]
    try:
        return runner.run(
            [
                TokenRun(sequence, states, range(len(states)), adapter)
                for sequence, (states, adapter) in zip(sequences, rows, strict=True)
            ]
        )
    finally:
        for sequence in sequences:
            sequence.free()
