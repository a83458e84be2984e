"""Denoising with a random UNet of real shape on one device: unsplit, the body alone, and split over processes.

Only the denoiser runs, in bfloat16. Each step has the same inputs, so that outputs can be compared.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import denoisers
from benchmarks.harness import fleet, note, now

#: Shapes: SDXL at 1024x1024 with guidance, and one that is small enough for a test.
SHAPES: dict[str, dict[str, Any]] = {
    "sdxl": denoisers.SHAPES["sdxl"],
    "tiny": denoisers.SHAPES["sdxl"]
    | {
        "size": 64,
        "tokens": 8,
        "config": denoisers.SHAPES["sdxl"]["config"]
        | {
            "block_out_channels": [32, 64, 64],
            "transformer_layers_per_block": 1,
            "attention_head_dim": [2, 4, 4],
            "cross_attention_dim": 48,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
    },
}

#: Timestep of all steps.
TIMESTEP = 500

#: Number of steps before the measured ones.
WARM = 5

#: Maximum number of devices at once.
DEVICES = 2

#: How long devices wait for each other before the measurement, in seconds.
PATIENCE = 180.0


@dataclass(frozen=True)
class Way:
    """How the UNet is split: the number of devices, the codec, and where the devices' own blocks run."""

    devices: int = 1
    codec: str = "none"
    dtype: str = "bfloat16"
    #: Device of the device's own blocks; None for that of the body.
    blocks: str | None = None
    #: Maximum number of measured steps, and of the steps before them.
    steps: int = 1000


#: Ways to split, by their names in the results. Unchanged bfloat16 has the size of fp16.
WAYS = {
    "1": Way(),
    "2": Way(DEVICES),
    "1.int8": Way(codec="int8"),
    "2.int8": Way(DEVICES, codec="int8"),
    "1.blocks_on_cpu": Way(codec="fp16", dtype="float32", blocks="cpu", steps=2),
}


def denoise(device: str, shape: str, steps: int) -> dict[str, Any]:
    """Steps per second, unsplit and for each way to split; `steps` of each are measured."""
    import torch

    place = torch.device(device)
    inputs = [_inputs(number, **SHAPES[shape]) for number in range(DEVICES)]
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / f"random-{shape}"
        unsplit, wanted = _unsplit(model, place, SHAPES[shape], steps, inputs)
        note(f"unsplit: {unsplit:.2f} steps/s")
        body = _rate(_body(model, place, SHAPES[shape]), place, steps)
        note(f"the body alone: {body:.2f} steps/s")
        measured = {}
        with fleet(model, "1:-1", "--device", device, "--dtype", "bfloat16") as (address, _):
            note("a worker serves it")
            for name, way in WAYS.items():
                if way.blocks == device:
                    continue
                blocks = torch.device(way.blocks or device)
                measured[name] = _split(model, address, way, blocks, steps, inputs, wanted)
                note(f"split, {name}: {measured[name]['split_steps_per_s']:.2f} steps/s")
    return {
        "hardware": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "unsplit_steps_per_s": unsplit,
        "body_steps_per_s": body,
        "body_ratio": body / unsplit,
        "ratio": {name: each["split_steps_per_s"] / unsplit for name, each in measured.items()},
        **{key: {name: each[key] for name, each in measured.items()} for key in measured["1"]},
    }


def _unsplit(
    model: Path, place: Any, shape: dict[str, Any], steps: int, inputs: list[Any]
) -> tuple[float, list[Any]]:
    """Makes and saves the UNet; returns its steps per second, and its output for each input."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with place:
        unet = UNet2DConditionModel(**shape["config"]).bfloat16().eval().requires_grad_(False)
    unet.save_pretrained(model)
    note("a random UNet is saved")
    given = [_moved(each, place) for each in inputs]
    wanted = [unet(**each).sample.float().cpu() for each in given]
    return _rate(lambda: unet(**given[0]), place, steps), wanted


def _inputs(number: int, config: dict[str, Any], size: int, tokens: int, rows: int, **_: Any) -> dict[str, Any]:
    """Arguments of the UNet of a device, on the host."""
    import torch

    generator = torch.Generator().manual_seed(number)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).bfloat16()

    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "sample": random(rows, 4, size // 8, size // 8),
        "encoder_hidden_states": random(rows, tokens, config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": random(rows, pooled), "time_ids": random(rows, 6)},
    }


def _moved(inputs: dict[str, Any], place: Any, dtype: Any = None) -> dict[str, Any]:
    moved = {
        name: _moved(value, place, dtype) if isinstance(value, dict) else value.to(place, dtype)
        for name, value in inputs.items()
    }
    return moved | {"timestep": TIMESTEP} if "sample" in moved else moved


def _rate(step: Callable[[], object], place: Any, steps: int) -> float:
    """Steps per second."""
    for _ in range(min(WARM, steps)):
        step()
    began = now(place)
    for _ in range(steps):
        step()
    return steps / (now(place) - began)


def _body(model: Path, place: Any, shape: dict[str, Any]) -> Callable[[], object]:
    """A step of the worker's body in this process, from the request's bytes to the answer's."""
    import torch

    from split_common.models.checkpoint import Checkpoint
    from split_common.models.denoisers.codecs import encode
    from split_common.models.denoisers.registry import read_denoiser_spec
    from split_common.protocol import payloads
    from split_worker.bodies.denoiser import DenoiserBody

    spec = read_denoiser_spec(Checkpoint.resolve(model))
    split = spec.split("C")
    body = DenoiserBody(spec, split, place)
    state = body.new_state()
    count = shape["rows"]
    text, data = encode(torch.randn(count, shape["tokens"], spec.config["cross_attention_dim"]).bfloat16())
    key = bytes(32)
    body.begin(state, payloads.Conditioning(key, [text]), memoryview(data))
    states = [encode(torch.randn(sizes).bfloat16()) for sizes in denoisers.step_shapes(spec, split, **shape)]
    request = payloads.Denoise(key, list(range(count)), [array for array, _ in states], "bfloat16")
    step = memoryview(b"".join(data for _, data in states))

    def run() -> object:
        (output,) = body.launch(body.begin(state, request, step)).wait()
        return body.reply(state, request, output)

    return run


def _split(
    model: Path, address: str, way: Way, place: Any, steps: int, inputs: list[Any], wanted: list[Any]
) -> dict[str, Any]:
    """Results for one way to split: of all devices together, and the stages of the first one's steps."""
    import torch

    from split_device import SplitUNet2DConditionModel

    dtype = getattr(torch, way.dtype)
    steps = min(steps, way.steps)
    barrier = threading.Barrier(way.devices, timeout=PATIENCE)

    def run(unet: Any, number: int) -> tuple[float, float, float]:
        """Start and end of the measurement, and the relative difference from the unsplit UNet's output."""
        given = _moved(inputs[number], place, dtype)
        # A session belongs to one thread.
        for _ in range(min(WARM, steps)):
            unet(**given)
        unet.timings.reset()
        before = unet.traffic
        barrier.wait()
        began = now(place)
        for _ in range(steps):
            output = unet(**given).sample
        ended = now(place)
        traffic.append(unet.traffic - before)
        error = (output.float().cpu() - wanted[number]).abs().max() / wanted[number].abs().max()
        return began, ended, float(error)

    traffic: list[Any] = []
    with contextlib.ExitStack() as stack:
        unets = [
            stack.enter_context(
                SplitUNet2DConditionModel.from_pretrained(
                    model, broker=address, cut="C", codec=way.codec, dtype=way.dtype
                )
            ).to(place)
            for _ in range(way.devices)
        ]
        threads = stack.enter_context(ThreadPoolExecutor(way.devices))
        began, ended, errors = zip(*threads.map(run, unets, range(way.devices)), strict=True)
        calls = way.devices * steps
        return {
            "split_steps_per_s": calls / (max(ended) - min(began)),
            "max_difference": max(errors),
            "bytes_up_per_step": sum(each["bytes_sent"] for each in traffic) / calls,
            "bytes_down_per_step": sum(each["bytes_received"] for each in traffic) / calls,
            "stages_ms": {stage: ms for stage, ms in unets[0].timings.per_step_ms().items() if ms},
        }
