"""A device process of the stress command: generates, compares with the unsplit model, and reports on stdout."""

from __future__ import annotations

import itertools
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from split_common.errors import SplitError
from split_common.models.split import DEFAULT_CUT, Layers
from split_common.system.console import emit_json
from split_common.system.process import passive_threads
from split_common.system.signals import catch_sigterm
from split_device.stress.events import Answered, Asked, Decoded, Event, Failed, Traffic, encode
from split_device.stress.plan import WorkloadKind

#: Interval between two `Decoded` events, in seconds.
DECODED_INTERVAL = 0.25

#: How long a device waits for the broker, and for workers, in seconds.
BROKER_TIMEOUT = 60.0
WORKER_PATIENCE = 180.0


class WorkloadModel(Protocol):
    """Generates the requests of a workload with a split model, and compares with the unsplit one."""

    #: The split model.
    split: Any

    def join(self) -> None:
        """Joins the queue with a new split model; one that there was is closed first. Raises SplitError."""

    def run(self, number: int) -> Any:
        """The split model's output for the request of this number. Raises SplitError."""

    def close(self) -> None:
        """Leaves the queue."""

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
    layers: Layers,
    keys: Path | None,
    rejoin: int | None = None,
    niceness: int = 0,
) -> None:
    """Makes requests until SIGTERM, and finishes the last one.

    Args:
        index: this device's number in the run.
        requests: number of requests; None for no limit.
        reference: the unsplit checkpoint to compare with; `model` if None.
        rejoin: number of requests after which the device leaves the queue and joins it again, as a new process
            would: it needs a new channel. None for never.
        niceness: added to this process's.
    """
    passive_threads()

    import torch

    torch.set_num_threads(1)
    stop = catch_sigterm()
    options = {
        "broker": broker,
        "dtype": "float32",
        "keys": keys,
        "timeout": BROKER_TIMEOUT,
        "patience": WORKER_PATIENCE,
        # Under faults all workers may be away when a device joins.
        "wait_for_first": True,
    }
    workload: WorkloadModel
    if kind == "image":
        workload = ImageWorkload(model, reference or model, seed, index, options)
    elif kind == "agents":
        workload = AgentsWorkload(model, reference or model, seed, index, options, layers)
    else:
        workload = TextWorkload(model, reference or model, seed, index, options, layers)
    emit_json({"pid": os.getpid()})
    os.nice(niceness)
    try:
        _make_requests(workload, itertools.count() if requests is None else range(requests), rejoin, stop)
    finally:
        workload.close()


def _make_requests(
    workload: WorkloadModel, numbers: Iterable[int], rejoin: int | None, stop: threading.Event
) -> None:
    clock = Clock(workload.split)
    # Of the connections that have been closed.
    past: Counter[str] = Counter()
    joined = True
    for number in numbers:
        if stop.is_set():
            return
        emit(Asked(number))
        try:
            if not joined or (rejoin is not None and number and number % rejoin == 0):
                past += workload.split.traffic if joined else Counter()
                joined = False
                workload.join()
                joined = True
                clock.watch(workload.split)
            clock.begin()
            output = workload.run(number)
        except SplitError as error:
            emit(Failed(number, f"{type(error).__name__}: {error}"))
        else:
            seconds = time.monotonic() - clock.began
            found = workload.compare(number, output)
            emit(Answered(number, seconds=seconds, gaps=clock.gaps, recoveries=clock.recoveries, **found))
        traffic = past + workload.split.traffic if joined else past
        emit(Traffic(traffic["bytes_sent"], traffic["bytes_received"], traffic["replays"]))


class _Workload(ABC):
    """Joins the queue with a split model, made from a checkpoint with these options, and draws requests to it."""

    def __init__(self, model: str, draw_key: tuple[int, int], options: dict[str, Any]) -> None:
        self._model, self._draw_key, self._options = model, draw_key, options
        self.split: Any = None
        self.join()

    def join(self) -> None:
        if self.split is not None:
            self.split.close()
        self.split = self._split_class().from_pretrained(self._model, **self._options)

    def close(self) -> None:
        self.split.close()

    def run(self, number: int) -> Any:
        return self._request(number).run(self.split)

    @abstractmethod
    def _split_class(self) -> Any: ...

    @abstractmethod
    def _request(self, number: int) -> Any:
        """The request of this number."""


class TextWorkload(_Workload):
    """Generates text with a language model."""

    def __init__(
        self, model: str, reference: str, seed: int, index: int, options: dict[str, Any], layers: Layers
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._unsplit = AutoModelForCausalLM.from_pretrained(
            reference, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        ).eval()
        head, tail = layers.ends(lambda: int(self._unsplit.config.get_text_config(decoder=True).num_hidden_layers))
        super().__init__(model, (seed, index), {"head_layers": head, "tail_layers": tail, **options})

    def _split_class(self) -> Any:
        from split_device.models.language import SplitModelForCausalLM

        return SplitModelForCausalLM

    def _request(self, number: int) -> Any:
        from split_device.stress.workload import draw

        return draw(*self._draw_key, number, self.split.config.vocab_size)

    def compare(self, number: int, output: Any) -> dict[str, Any]:
        import torch

        wanted = self._request(number).run(self._unsplit)
        return {"tokens": output.numel(), "wanted": wanted.numel(), "equal": torch.equal(output, wanted)}


class AgentsWorkload(TextWorkload):
    """Holds conversations through a generator with a prefix cache."""

    _generator: Any = None

    def join(self) -> None:
        from split_device.generation.generator import Generator
        from split_device.stress.agents import KV_MEMORY

        if self._generator is not None:
            self._generator.close()
        super().join()
        self._generator = Generator(self.split, kv_memory=KV_MEMORY)

    def close(self) -> None:
        if self._generator is not None:
            self._generator.close()
        super().close()

    def _request(self, number: int) -> Any:
        from split_device.stress.agents import draw

        return draw(*self._draw_key, number, self.split.config.vocab_size)

    def run(self, number: int) -> Any:
        from split_device.stress.agents import hold

        return hold(self._generator, self._request(number))

    def compare(self, number: int, output: Any) -> dict[str, Any]:
        from split_device.stress.agents import answered_tokens, hold_unsplit

        wanted = hold_unsplit(self._unsplit, self._request(number))
        tokens = answered_tokens(self._request(number))
        return {"tokens": tokens, "wanted": tokens, "equal": output == wanted}


class ImageWorkload(_Workload):
    """Generates images with a UNet."""

    def __init__(self, model: str, reference: str, seed: int, index: int, options: dict[str, Any]) -> None:
        import torch
        from diffusers import UNet2DConditionModel
        from diffusers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._unsplit = UNet2DConditionModel.from_pretrained(_unet_directory(reference), dtype=torch.float32).eval()
        super().__init__(model, (seed, index), {"cut": DEFAULT_CUT, **options})

    def _split_class(self) -> Any:
        from split_device.models.unet import SplitUNet2DConditionModel

        return SplitUNet2DConditionModel

    def _request(self, number: int) -> Any:
        from split_device.stress.images import draw

        return draw(*self._draw_key, number, self.split.config)

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
        self._decoded = 0
        self._reported = time.monotonic()
        self.watch(split)
        self.begin()

    def watch(self, split: Any) -> None:
        """Measures the steps of this model from now on."""
        self._split = split
        split.register_forward_hook(self._after_step)

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
        if now - self._reported > DECODED_INTERVAL:
            emit(Decoded(self._decoded))
            self._reported, self._decoded = now, 0


def emit(event: Event) -> None:
    """Prints an event as a line."""
    print(encode(event), flush=True)
