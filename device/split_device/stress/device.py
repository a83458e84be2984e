"""A device process of the stress command: generates, compares with the unsplit model, reports on stdout."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any, Protocol

from split_common.errors import SplitError
from split_common.system.console import emit_json
from split_common.system.process import passive_threads
from split_common.system.signals import catch_sigterm
from split_device.stress.events import Answered, Asked, Decoded, Event, Failed, Traffic, encode
from split_device.stress.plan import STRESS_CUT, WorkloadKind

#: Interval between two `Decoded` events, in seconds.
DECODED_INTERVAL = 0.25

#: How long a device waits for a broker, and for workers, in seconds.
BROKER_TIMEOUT = 60.0
WORKER_PATIENCE = 180.0

#: Added to the process's niceness, so that workers and broker run as if on machines of their own.
NICENESS = 10


class Asker(Protocol):
    """A workload: what a device generates, with a split and an unsplit model."""

    #: The split model.
    split: Any

    def ask(self, number: int) -> Any:
        """The split model's output for the request of this number. Raises SplitError."""

    def compare(self, number: int, output: Any) -> dict[str, Any]:
        """Fields of `Answered` about an output: its size, and whether it equals the unsplit model's."""


def run_device(
    model: str,
    broker: str,
    index: int,
    *,
    kind: WorkloadKind,
    seed: int,
    requests: int | None,
    reference: str | None,
    head_layers: int,
    tail_layers: int,
    keys: Path | None,
) -> None:
    """Makes requests until SIGTERM, then ends the last one.

    Args:
        index: of this device among those of the run.
        requests: number of requests; None for no end.
        reference: the unsplit checkpoint to compare with; `model` if None.
    """
    passive_threads()

    import torch

    torch.set_num_threads(1)
    stop = catch_sigterm()
    queue = {
        "broker": broker,
        "dtype": "float32",
        "keys": keys,
        "timeout": BROKER_TIMEOUT,
        "patience": WORKER_PATIENCE,
    }
    asker: Asker
    if kind == "image":
        asker = ImageAsker(model, reference or model, seed, index, queue)
    else:
        asker = TextAsker(model, reference or model, seed, index, queue, head_layers, tail_layers)
    with asker.split:
        emit_json({"pid": os.getpid()})
        os.nice(NICENESS)
        clock = Clock(asker.split)
        for number in itertools.count() if requests is None else range(requests):
            if stop.is_set():
                break
            tell(Asked(number))
            clock.begin()
            try:
                output = asker.ask(number)
            except SplitError as error:
                tell(Failed(number, f"{type(error).__name__}: {error}"))
            else:
                seconds = time.monotonic() - clock.began
                found = asker.compare(number, output)
                tell(Answered(number, seconds=seconds, gaps=clock.gaps, recoveries=clock.recoveries, **found))
            traffic = asker.split.traffic
            tell(Traffic(traffic["bytes_sent"], traffic["bytes_received"], traffic["replays"]))


class TextAsker:
    """Generates text with a language model."""

    def __init__(
        self, model: str, reference: str, seed: int, index: int, queue: dict[str, Any], head: int, tail: int
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from split_device.models.language import SplitModelForCausalLM

        self._place = seed, index
        self._unsplit = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
        self.split = SplitModelForCausalLM.from_pretrained(model, head_layers=head, tail_layers=tail, **queue)

    def _request(self, number: int) -> Any:
        from split_device.stress.workload import draw

        return draw(*self._place, number, self.split.config.vocab_size)

    def ask(self, number: int) -> Any:
        return self._request(number).run(self.split)

    def compare(self, number: int, output: Any) -> dict[str, Any]:
        import torch

        wanted = self._request(number).run(self._unsplit)
        return {"tokens": output.numel(), "wanted": wanted.numel(), "equal": torch.equal(output, wanted)}


class ImageAsker:
    """Generates images with a UNet."""

    def __init__(self, model: str, reference: str, seed: int, index: int, queue: dict[str, Any]) -> None:
        import torch
        from diffusers import UNet2DConditionModel
        from diffusers.utils import logging

        from split_device.models.unet import SplitUNet2DConditionModel

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._place = seed, index
        self._unsplit = UNet2DConditionModel.from_pretrained(_unet_directory(reference), dtype=torch.float32).eval()
        self.split = SplitUNet2DConditionModel.from_pretrained(model, cut=STRESS_CUT, **queue)

    def _request(self, number: int) -> Any:
        from split_device.stress.images import draw

        return draw(*self._place, number, self.split.config)

    def ask(self, number: int) -> Any:
        return self._request(number).run(self.split)

    def compare(self, number: int, output: Any) -> dict[str, Any]:
        from split_device.stress.images import agree

        request = self._request(number)
        return {"steps": request.steps, "equal": agree(output, request.run(self._unsplit))}


def _unet_directory(model: str) -> str:
    """The directory of the UNet, for the directory of a UNet or of a pipeline."""
    inner = Path(model) / "unet"
    return str(inner if inner.is_dir() else model)


class Clock:
    """Measures the steps of successive requests."""

    def __init__(self, split: Any) -> None:
        self._split = split
        self._decoded = 0
        self._told = time.monotonic()
        split.register_forward_hook(self._after_step)
        self.begin()

    def begin(self) -> None:
        """Starts the measurement of a request."""
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
        # A step of an image counts once.
        self._decoded += output.logits.shape[0] if hasattr(output, "logits") else 1
        if now - self._told > DECODED_INTERVAL:
            tell(Decoded(self._decoded))
            self._told, self._decoded = now, 0


def tell(event: Event) -> None:
    """Prints an event as a line."""
    print(encode(event), flush=True)
