"""A worker is killed in the midst of an image, by each pipeline: another one takes over, and no number differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from test_diffusion import controlnet, image, latents, lora, mask, pipeline
from test_ip_adapter import embeddings, load

import tiny_diffusion
from benchmarks.workers import Workers
from fleet import running_broker, using
from split_device import SplitFluxTransformer2DModel, SplitSD3Transformer2DModel, SplitUNet2DConditionModel

#: The step after which the worker dies.
DEADLY = 1


class Fleet:
    """A queue, and one worker of each model that is asked for."""

    def __init__(self, broker: str, workers: Workers) -> None:
        self.broker = broker
        self._workers = workers
        self._serving: dict[tuple[Path, Path | None], bytes] = {}

    def ensure(self, model: Path, adapter: Path | None = None) -> None:
        """One worker of a model."""
        if (model, adapter) not in self._serving:
            self._serving[model, adapter] = self._start(model, adapter)

    def replace(self, model: Path, adapter: Path | None = None) -> None:
        """Kills it, and has another one ready."""
        old = self._serving[model, adapter]
        self._serving[model, adapter] = self._start(model, adapter)
        self._workers.kill(old)

    def _start(self, model: Path, adapter: Path | None) -> bytes:
        options = ["--ip-adapter", str(adapter)] if adapter is not None else []
        return self._workers.start("--model", str(model), "--broker", self.broker, "--cut", "C", *options)


@pytest.fixture(scope="module")
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def workers(transport: str) -> Iterator[Fleet]:
    with running_broker() as broker, Workers(imports=["diffusers"]) as workers:
        yield Fleet(broker.address, workers)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    sdxl = tiny_diffusion.save_sdxl(directory)
    return {
        "sdxl": sdxl,
        "sd3": tiny_diffusion.save_sd3(directory),
        "flux": tiny_diffusion.save_flux(directory),
        "adapter": tiny_diffusion.save_ip_adapter(directory / "ip.safetensors", sdxl),
    }


#: Makes an image with some parts of the pipeline given, and something to be called after each step.
Make = Callable[[dict[str, Path], dict[str, Any], dict[str, Any]], torch.Tensor]


def by_scheduler(name: str) -> Make:
    def make(models: dict[str, Path], parts: dict[str, Any], more: dict[str, Any]) -> torch.Tensor:
        pipe = pipeline(models["sdxl"], **parts)
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        return latents(pipe, **more)

    return make


def from_image(kind: str, **options: Any) -> Make:
    def make(models: dict[str, Path], parts: dict[str, Any], more: dict[str, Any]) -> torch.Tensor:
        pipe = pipeline(models["sdxl"], f"StableDiffusionXL{kind}Pipeline", **parts)
        more |= {"height": None, "width": None, "num_inference_steps": 6}
        return latents(pipe, image=image(), strength=0.7, **options, **more)

    return make


def with_controlnet(models: dict[str, Path], parts: dict[str, Any], more: dict[str, Any]) -> torch.Tensor:
    net = controlnet(pipeline(models["sdxl"]))
    pipe = pipeline(models["sdxl"], "StableDiffusionXLControlNetPipeline", controlnet=net, **parts)
    return latents(pipe, image=image(), **more)


def with_lora(models: dict[str, Path], parts: dict[str, Any], more: dict[str, Any]) -> torch.Tensor:
    weights = lora(models["sdxl"], models["sdxl"].parent, r"(down_blocks\.0|up_blocks\.2)\.resnets\.\d\.conv1")
    pipe = pipeline(models["sdxl"], **parts)
    pipe.load_lora_weights(dict(weights))
    return latents(pipe, **more)


def with_ip_adapter(models: dict[str, Path], parts: dict[str, Any], more: dict[str, Any]) -> torch.Tensor:
    pipe = pipeline(models["sdxl"], **parts)
    load(pipe, models["adapter"])
    return latents(pipe, ip_adapter_image_embeds=embeddings(), **more)


def by_transformer(name: str, kind: str) -> Make:
    def make(models: dict[str, Path], parts: dict[str, Any], more: dict[str, Any]) -> torch.Tensor:
        return latents(pipeline(models[name], kind, **parts), max_sequence_length=tiny_diffusion.TOKENS, **more)

    return make


#: Of each pipeline: its model, and how it makes an image.
PIPELINES: dict[str, tuple[str, Make]] = {
    "Euler": ("sdxl", by_scheduler("EulerDiscreteScheduler")),
    "DDIM": ("sdxl", by_scheduler("DDIMScheduler")),
    "DPM++": ("sdxl", by_scheduler("DPMSolverMultistepScheduler")),
    "image to image": ("sdxl", from_image("Img2Img")),
    "inpainting": ("sdxl", from_image("Inpaint", mask_image=mask())),
    "ControlNet": ("sdxl", with_controlnet),
    "LoRA": ("sdxl", with_lora),
    "IP-Adapter": ("sdxl", with_ip_adapter),
    "SD 3": ("sd3", by_transformer("sd3", "StableDiffusion3Pipeline")),
    "Flux": ("flux", by_transformer("flux", "FluxPipeline")),
}

CLASSES: dict[str, Any] = {
    "sdxl": SplitUNet2DConditionModel,
    "sd3": SplitSD3Transformer2DModel,
    "flux": SplitFluxTransformer2DModel,
}


#: One pipeline of each class of denoisers: always run, also as on other CPUs, and over Redis in `make test-long`.
#: Each costs the start of a worker.
FIRST = ("Euler", "SD 3", "Flux")


@pytest.mark.parametrize(
    ("transport", "name"),
    [
        pytest.param(transport, name, marks=first if name in FIRST else later)
        for transport, first, later in (
            ("zmq", pytest.mark.numbers, pytest.mark.long),
            ("redis", pytest.mark.long, pytest.mark.nightly),
        )
        for name in PIPELINES
    ],
    indirect=["transport"],
)
def test_a_worker_is_killed_in_mid_image(workers: Fleet, models: dict[str, Path], name: str) -> None:
    kind, make = PIPELINES[name]
    model, adapter = models[kind], models["adapter"] if name == "IP-Adapter" else None
    part = "unet" if kind == "sdxl" else "transformer"
    workers.ensure(model, adapter)
    steps: list[int] = []

    def kill(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if step == DEADLY:
            workers.replace(model, adapter)
        return values

    with CLASSES[kind].from_pretrained(model, broker=workers.broker, ip_adapter=adapter) as denoiser:
        ours = make(models, {part: denoiser}, {"callback_on_step_end": kill})
        wanted = make(models, {}, {})
        assert denoiser.timings.steps == len(steps) > DEADLY + 1
    assert wanted.std() > 0
    assert torch.equal(ours, wanted)
