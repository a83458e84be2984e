"""A forward that was launched, which on CUDA runs while the host does other work; and what launches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from split_common.engine.sequences import KVStore, TokenRun


class Forward:
    """A forward that was launched, whose output is being copied to the host.

    Args:
        output: of all runs, `[rows, ...]`, on the device that computes it. It may be overwritten, on the same
            stream, as soon as the constructor returns.
        counts: how many rows of the output belong to each run.
        order: the index of the run of each count; None if the runs are in order.
    """

    def __init__(self, output: torch.Tensor, counts: Sequence[int], order: Sequence[int] | None = None) -> None:
        self._counts = counts
        self._order = range(len(counts)) if order is None else order
        self._arrived: torch.cuda.Event | None = None
        self._host = output
        if output.is_cuda:
            self._host = torch.empty_like(output, device="cpu", pin_memory=True)
            self._host.copy_(output, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(output.device))

    def wait(self) -> list[torch.Tensor]:
        """Waits for the output, and returns that of each run, `[rows, ...]`, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        parts = torch.split(self._host, list(self._counts))
        return [part for _, part in sorted(zip(self._order, parts, strict=True), key=lambda pair: pair[0])]


class Executor(Protocol):
    """One way to run layers over many sequences, and to keep their keys and values."""

    @property
    def store(self) -> KVStore:
        """The sequences' memory."""

    @property
    def attention(self) -> str | None:
        """The name of the attention backend; None if sequences run one at a time."""

    @property
    def takes_trees(self) -> bool:
        """Whether it takes runs with parents."""

    @property
    def fusion(self) -> str | None:
        """`fused` if layers run in one call of code compiled for this CPU, `compiling` if they will; else None."""

    def launch(self, runs: Sequence[TokenRun[Any]]) -> Forward:
        """Starts a forward that appends tokens to sequences of the store."""
