"""A device process of the stress command: asks, compares with the unsplit model, and tells of it on stdout."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from split_common.console import emit_json
from split_common.errors import SplitError
from split_common.options import JsonOption
from split_common.process import catch_sigterm, passive_threads
from split_device.stress.events import Answered, Asked, Decoded, Event, Failed, Traffic, encode

#: Seconds between two events that tell how many tokens were decoded.
DECODED_INTERVAL = 0.25

#: Seconds for which a device bears a broker that is away, and workers that are.
TIMEOUT = 60.0
PATIENCE = 180.0

#: Added to the process's niceness: workers and broker come first, as if they had a machine of their own.
NICENESS = 10


def stress_device(
    model: Annotated[str, typer.Option()],
    broker: Annotated[str, typer.Option()],
    index: Annotated[int, typer.Option()],
    seed: Annotated[int, typer.Option()] = 0,
    requests: Annotated[int | None, typer.Option()] = None,
    reference: Annotated[str | None, typer.Option()] = None,
    head_layers: Annotated[int, typer.Option()] = 2,
    tail_layers: Annotated[int, typer.Option()] = 2,
    keys: Annotated[Path | None, typer.Option()] = None,
    json: JsonOption = False,
) -> None:
    """A device of `lambda-split stress`, which starts it: makes requests until SIGTERM, then ends the last one."""
    passive_threads()

    import torch
    from transformers import AutoModelForCausalLM

    from split_device.model import SplitModelForCausalLM
    from split_device.stress.workload import draw

    torch.set_num_threads(1)
    stop = catch_sigterm()
    unsplit = AutoModelForCausalLM.from_pretrained(reference or model, dtype=torch.float32).eval()
    with SplitModelForCausalLM.from_pretrained(
        model,
        broker=broker,
        head_layers=head_layers,
        tail_layers=tail_layers,
        dtype="float32",
        keys=keys,
        timeout=TIMEOUT,
        patience=PATIENCE,
    ) as split:
        emit_json({"pid": os.getpid()})
        os.nice(NICENESS)
        clock = Clock(split)
        for number in itertools.count() if requests is None else range(requests):
            if stop.is_set():
                break
            request = draw(seed, index, number, split.config.vocab_size)
            tell(Asked(number))
            clock.begin()
            try:
                output = request.run(split)
            except SplitError as error:
                tell(Failed(number, f"{type(error).__name__}: {error}"))
            else:
                seconds = time.monotonic() - clock.began
                wanted = request.run(unsplit)
                equal = torch.equal(output, wanted)
                tell(Answered(number, output.numel(), wanted.numel(), equal, seconds, clock.gaps, clock.recoveries))
            traffic = split.traffic
            tell(Traffic(traffic["bytes_sent"], traffic["bytes_received"], traffic["replays"]))


class Clock:
    """Measures the steps of one request after another."""

    def __init__(self, split: Any) -> None:
        self._split = split
        self._decoded = 0
        self._told = time.monotonic()
        split.register_forward_hook(self._after_step)
        self.begin()

    def begin(self) -> None:
        """A request begins."""
        self.began = self._last = time.monotonic()
        self._replays = self._split.traffic["replays"]
        self._steps = 0
        self.gaps: list[float] = []
        self.recoveries: list[float] = []

    def _after_step(self, _model: Any, _args: Any, output: Any) -> None:
        now = time.monotonic()
        replays = self._split.traffic["replays"]
        if replays > self._replays:
            self.recoveries.append(round(now - self._last, 4))
        if self._steps:
            self.gaps.append(round(now - self._last, 4))
        self._steps += 1
        self._last, self._replays = now, replays
        self._decoded += output.logits.shape[0]
        if now - self._told > DECODED_INTERVAL:
            tell(Decoded(self._decoded))
            self._told, self._decoded = now, 0


def tell(event: Event) -> None:
    """Prints an event's line."""
    print(encode(event), flush=True)
