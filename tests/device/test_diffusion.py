"""A split UNet in the pipelines of diffusers: the same numbers as unsplit, through a real queue and worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

import tiny
import tiny_diffusion
from fleet import TRANSPORTS_IN_TURN, running_broker, start_worker, using
from split_common.errors import (
    ConfigError,
    InvalidSplit,
    Malformed,
    NonFinite,
    NoWorker,
    Oversized,
    UnsupportedFeature,
)
from split_common.protocol import payloads
from split_device import SplitUNet2DConditionModel
from split_device.sessions import images as session
from split_worker.worker import Worker
from wiretap import record_requests

SIZE = 64
PROMPT = "a red seven"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.save_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module", params=TRANSPORTS_IN_TURN)
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def broker(transport: str) -> Iterator[Any]:
    with running_broker() as running:
        yield running


@pytest.fixture(scope="module")
def worker(broker: Any, sdxl: Path) -> Iterator[Worker]:
    running = start_worker(sdxl, broker.address, cut="C")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def unet(broker: Any, sdxl: Path, worker: Worker) -> Iterator[SplitUNet2DConditionModel]:
    with SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address) as model:
        yield model


def pipeline(path: Path, kind: str = "StableDiffusionXLPipeline", **parts: Any) -> Any:
    pipe = tiny_diffusion.frozen(getattr(diffusers, kind).from_pretrained(path, **parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"num_inference_steps": 4, "height": SIZE, "width": SIZE, **options}
    generator = torch.Generator().manual_seed(seed)
    images: torch.Tensor = pipe(PROMPT, output_type="latent", generator=generator, **settings).images
    return images


def image(seed: int = 0) -> Image.Image:
    noise = torch.rand(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).byte().numpy())


def mask() -> Image.Image:
    return Image.fromarray((torch.arange(SIZE * SIZE).view(SIZE, SIZE) > SIZE * SIZE // 2).byte().numpy() * 255)


def controlnet(pipe: Any) -> Any:
    torch.manual_seed(1)
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    # Its last convolutions begin as zeros, and would add nothing.
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)
    return net


# --- equal to unsplit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param("EulerDiscreteScheduler", marks=pytest.mark.numbers),
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
    ],
)
def test_text_to_image(sdxl: Path, unet: Any, scheduler: str) -> None:
    pipes = [pipeline(sdxl), pipeline(sdxl, unet=unet)]
    for pipe in pipes:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    wanted, ours = map(latents, pipes)
    assert wanted.std() > 0
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"negative_prompt": "blue"},
        pytest.param({"num_images_per_prompt": 3}, marks=pytest.mark.numbers),
        pytest.param({"height": 72, "width": 56}, marks=pytest.mark.numbers),
    ],
    ids=["no guidance", "negative", "three images", "odd size"],
)
def test_options(sdxl: Path, unet: Any, options: dict[str, Any]) -> None:
    assert torch.equal(latents(pipeline(sdxl, unet=unet), **options), latents(pipeline(sdxl), **options))


@pytest.mark.parametrize(
    ("kind", "more"),
    [("StableDiffusionXLImg2ImgPipeline", {}), ("StableDiffusionXLInpaintPipeline", {"mask_image": mask()})],
    ids=["img2img", "inpainting"],
)
def test_from_an_image(sdxl: Path, unet: Any, kind: str, more: dict[str, Any]) -> None:
    wanted, ours = (
        pipeline(sdxl, kind, **parts)(
            PROMPT,
            image=image(),
            strength=0.7,
            num_inference_steps=6,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **more,
        ).images
        for parts in ({}, {"unet": unet})
    )
    assert torch.equal(ours, wanted)


def test_controlnet(sdxl: Path, unet: Any) -> None:
    net = controlnet(pipeline(sdxl))
    kind = "StableDiffusionXLControlNetPipeline"
    wanted, ours = (
        latents(pipeline(sdxl, kind, controlnet=net, **parts), image=image()) for parts in ({}, {"unet": unet})
    )
    assert torch.equal(ours, wanted)
    assert not torch.equal(ours, latents(pipeline(sdxl)))


@pytest.mark.parametrize("cut", ["A", "C"])
@pytest.mark.numbers
def test_a_unet_of_another_shape_at_both_cuts(broker: Any, sd15: Path, cut: str) -> None:
    worker = start_worker(sd15, broker.address, cut=cut)
    try:
        with SplitUNet2DConditionModel.from_pretrained(sd15, broker=broker.address, cut=cut) as unet:
            pipes = [pipeline(sd15, "StableDiffusionPipeline", **parts) for parts in ({}, {"unet": unet})]
            wanted, ours = map(latents, pipes)
            assert torch.equal(ours, wanted)
    finally:
        worker.stop()


# --- what travels ------------------------------------------------------------------------------------------


def test_embeddings_travel_once_and_default_negatives_not_at_all(
    sdxl: Path, unet: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = record_requests(monkeypatch)
    pipe = pipeline(sdxl, unet=unet)
    before = unet.traffic["replays"]
    pipe("something else", num_inference_steps=3, height=SIZE, width=SIZE, output_type="latent")
    # On a machine that is very busy a worker may seem dead: then all goes to it once more.
    again = unet.traffic["replays"] - before
    conditions = [request for request in sent if isinstance(request, payloads.Conditioning)]
    steps = [request for request in sent if isinstance(request, payloads.Denoise)]
    assert len(conditions) == 1 + again
    assert conditions[0].arrays[0].shape == [1, tiny_diffusion.TOKENS, 2 * tiny_diffusion.TEXT]
    assert [step.rows for step in steps] == [[-1, 0]] * (3 + again)
    facts = worker.facts()
    assert facts["held_bytes"] >= tiny_diffusion.TOKENS * 2 * tiny_diffusion.TEXT * 4
    assert "kv_tokens" not in facts


def test_a_worker_that_lacks_the_embeddings_gets_them_again(sdxl: Path, unet: Any, worker: Worker) -> None:
    pipe = pipeline(sdxl, unet=unet)
    wanted = latents(pipe)
    before = worker.counters["refused_embeddings"]

    def forget(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            worker._body.held._held.clear()  # type: ignore[attr-defined]
        return values

    assert torch.equal(latents(pipe, callback_on_step_end=forget), wanted)
    assert worker.counters["refused_embeddings"] == before + 1


def test_a_worker_that_forgets_the_embeddings_each_time_is_left(
    sdxl: Path, unet: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory may be others' just now: nothing is wrong with the image."""
    pipe = pipeline(sdxl, unet=unet)
    wanted = latents(pipe)
    body: Any = worker._body
    held = body.held
    conditioning, times = held.conditioning, iter(range(session.MAX_EMBEDDINGS + 1))

    def crowded(state: Any, key: bytes) -> Any:
        if next(times, None) is not None:
            held.forget(state)
        return conditioning(state, key)

    monkeypatch.setattr(held, "conditioning", crowded)
    assert torch.equal(latents(pipe), wanted)


def test_a_step_too_large_for_one_message_travels_in_several(
    sdxl: Path, unet: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(sdxl, unet=unet)
    wanted = latents(pipe, num_images_per_prompt=2)
    # One row has 32 × 16 × 16 numbers up and 64 × 16 × 16 down; there are four.
    monkeypatch.setattr(payloads, "PART_BYTES", 50_000)
    before = worker.counters["steps"], worker.counters["refused_embeddings"]
    calls: list[int] = []
    send = session.RemoteSession.call

    def spy(self: Any, requests: Any, timings: Any) -> Any:
        calls.append(len(requests))
        if len(calls) == 3:
            # What was sent before is forgotten in the midst of a step.
            worker._body.held._held.clear()  # type: ignore[attr-defined]
        return send(self, requests, timings)

    monkeypatch.setattr(session.RemoteSession, "call", spy)
    assert torch.equal(latents(pipe, num_images_per_prompt=2), wanted)
    assert (worker.counters["steps"], worker.counters["refused_embeddings"]) == (before[0] + 4, before[1] + 1 + 5)
    # Two parts, a step, and the rest of its output in five; once the embeddings again.
    assert calls == [8, 8, 8, 9, 8]
    monkeypatch.setattr(payloads, "MAX_STEP", 100_000)
    with pytest.raises(Oversized, match="smaller codec"):
        latents(pipe)


def test_devices_share_forwards(sdxl: Path, broker: Any, worker: Worker) -> None:
    """Several images at once, of two sizes: equal shapes are computed together."""
    options = [{"seed": 1}, {"seed": 2}, {"seed": 3, "height": 32, "width": 32}, {"seed": 4}]
    whole = pipeline(sdxl)
    wanted = [latents(whole, **each) for each in options]
    before = worker.counters["forwards"], worker.counters["rows"]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(options)) as pool:
        unets = [
            stack.enter_context(SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address))
            for _ in options
        ]
        # Loading is not for several threads.
        pipes = [pipeline(sdxl, unet=unet) for unet in unets]
        outputs = list(pool.map(lambda pipe, each: latents(pipe, **each), pipes, options))
    for ours, expected in zip(outputs, wanted, strict=True):
        assert tiny.deviation(ours, expected) <= 1e-5
    forwards, rows = worker.counters["forwards"] - before[0], worker.counters["rows"] - before[1]
    assert rows == 16
    assert forwards < rows


@pytest.mark.parametrize(("codec", "least"), [("fp16", 75.0), ("int8", 45.0), ("int4", 20.0)])
def test_codecs_cost_little(sdxl: Path, broker: Any, worker: Worker, codec: str, least: float) -> None:
    wanted = latents(pipeline(sdxl))
    with SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address, codec=codec) as unet:
        ours = latents(pipeline(sdxl, unet=unet))
    error = (ours - wanted).pow(2).mean()
    assert error > 0
    assert 10 * torch.log10((wanted.max() - wanted.min()) ** 2 / error) >= least


def test_the_output_is_reused(sdxl: Path, broker: Any, worker: Worker) -> None:
    with SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address, reuse=3) as unet:
        pipe = pipeline(sdxl, unet=unet)
        before = worker.counters["steps"]
        first = latents(pipe, num_inference_steps=7)
        assert worker.counters["steps"] - before == 3
        # An image of its own: it begins with a call.
        assert torch.equal(latents(pipe, num_inference_steps=7), first)
        assert worker.counters["steps"] - before == 6
        latents(pipe, num_inference_steps=3, height=32, width=32)
        assert worker.counters["steps"] - before == 7


# --- what is refused ---------------------------------------------------------------------------------------


def test_bad_input_is_refused_and_nothing_is_lost(sdxl: Path, unet: Any, worker: Worker) -> None:
    sample = torch.zeros(1, 4, 32, 32)
    given: dict[str, Any] = {
        "encoder_hidden_states": torch.ones(1, tiny_diffusion.TOKENS, 2 * tiny_diffusion.TEXT),
        "added_cond_kwargs": {"text_embeds": torch.ones(1, tiny_diffusion.TEXT), "time_ids": torch.ones(1, 6)},
    }
    before = worker.counters["steps"]
    with pytest.raises(NonFinite):
        unet(sample / 0, 1, **given)
    with pytest.raises(UnsupportedFeature, match="unexpected keyword argument 'momentum'"):
        unet(sample, 1, **given, momentum=0.9)
    with pytest.raises(Malformed, match="the model's width is 64"):
        unet(sample, 1, **given | {"encoder_hidden_states": torch.ones(1, tiny_diffusion.TOKENS, 65)})
    with pytest.raises(UnsupportedFeature, match="attention_mask"):
        unet(sample, 1, **given, encoder_attention_mask=torch.ones(1, tiny_diffusion.TOKENS))
    with pytest.raises(UnsupportedFeature, match="T2I-Adapter"):
        unet(sample, 1, **given, down_intrablock_additional_residuals=[sample])
    with pytest.raises(UnsupportedFeature, match="another size"):
        unet(
            sample,
            1,
            **given,
            down_block_additional_residuals=[torch.zeros(1, 32, 32, 32)] * 3,
            mid_block_additional_residual=torch.zeros(1, 96, 8, 8),
        )
    with pytest.raises(UnsupportedFeature, match="gradients"):
        unet(sample.clone().requires_grad_(), 1, **given)
    with pytest.raises(UnsupportedFeature, match="FreeU"):
        pipeline(sdxl, unet=unet).enable_freeu(0.9, 0.2, 1.1, 1.2)
    assert worker.counters["steps"] == before
    unet(sample, 1, **given)
    assert worker.counters["steps"] == before + 1


def lora_of(pipe: Any, directory: Path, targets: Any) -> dict[str, torch.Tensor]:
    """A random LoRA of some modules of a pipeline's denoiser, as a pipeline loads it."""
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers
    from safetensors.torch import load_file

    torch.manual_seed(3)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = getattr(pipe, part)
    denoiser.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    state = peft.utils.get_peft_model_state_dict(denoiser)
    if part == "unet":
        state = convert_state_dict_to_diffusers(state)
    type(pipe).save_lora_weights(directory, **{f"{part}_lora_layers": state})
    return load_file(directory / "pytorch_lora_weights.safetensors")


def lora(path: Path, directory: Path, targets: Any) -> dict[str, torch.Tensor]:
    return lora_of(pipeline(path), directory, targets)


def test_a_lora_of_the_devices_blocks(sdxl: Path, unet: Any, tmp_path: Path) -> None:
    weights = lora(sdxl, tmp_path, r"(down_blocks\.0|up_blocks\.2)\.resnets\.\d\.conv1")
    pipes = [pipeline(sdxl), pipeline(sdxl, unet=unet)]
    plain = latents(pipes[0])
    for pipe in pipes:
        pipe.load_lora_weights(dict(weights))
    try:
        for options in ({}, {"cross_attention_kwargs": {"scale": 0.3}}):
            wanted, ours = (latents(pipe, **options) for pipe in pipes)
            assert torch.equal(ours, wanted)
            assert not torch.equal(wanted, plain)
    finally:
        pipes[1].unload_lora_weights()


def test_a_lora_of_the_workers_blocks_is_refused_until_it_is_fused(
    sdxl: Path, unet: Any, broker: Any, tmp_path: Path
) -> None:
    weights = lora(sdxl, tmp_path, ["to_q"])
    with pytest.raises(UnsupportedFeature, match="which is on the worker"):
        pipeline(sdxl, unet=unet).load_lora_weights(dict(weights))
    whole = pipeline(sdxl)
    whole.load_lora_weights(dict(weights))
    whole.fuse_lora()
    whole.unload_lora_weights()
    tiny_diffusion.frozen(whole)
    whole.save_pretrained(tmp_path / "fused")
    worker = start_worker(tmp_path / "fused", broker.address)
    try:
        with SplitUNet2DConditionModel.from_pretrained(tmp_path / "fused", broker=broker.address) as fused:
            ours = latents(pipeline(tmp_path / "fused", unet=fused))
    finally:
        worker.stop()
    assert torch.equal(ours, latents(whole))


def test_weights_of_the_workers_blocks_are_refused(unet: Any) -> None:
    name = "unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"
    with pytest.raises(UnsupportedFeature, match="which is on the worker"):
        unet.load_lora_adapter({name: torch.zeros(4, 64)}, prefix="unet")


def test_adapters_and_saving_are_refused_by_name(unet: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="IP-Adapter"):
        unet._load_ip_adapter_weights([{}])
    with pytest.raises(UnsupportedFeature, match="save the original"):
        unet.save_pretrained(tmp_path)


def test_cuts_that_are_none(sdxl: Path, broker: Any, worker: Worker) -> None:
    with pytest.raises(ConfigError, match="invalid cut"):
        SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address, cut="B")
    with pytest.raises(ConfigError, match="invalid codec"):
        SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address, codec="int2")
    # A denoiser's sessions have no history.
    with pytest.raises(TypeError, match="history_memory"):
        SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address, history_memory=1)
    with pytest.raises(InvalidSplit, match="as many from each end"):
        start_worker(sdxl, broker.address, layers="1:-2")
    with (
        SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address, cut="A") as unet,
        pytest.raises(NoWorker, match="2:5"),
    ):
        latents(pipeline(sdxl, unet=unet))


def test_a_worker_without_blocks_of_images(sdxl: Path, broker: Any, worker: Worker, tmp_path: Path) -> None:
    """It is not found; and a request of another kind that reaches it is refused."""
    language = start_worker(tiny.save("mistral", tmp_path), broker.address)
    try:
        with SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address, cut="A") as unet:
            pipe = pipeline(sdxl, unet=unet)
            with pytest.raises(NoWorker, match="2:5"):
                latents(pipe)
            unet._client.service = language._service
            with pytest.raises(Malformed, match="Conditioning for a language model"):
                latents(pipe)
            assert language.counters["refused_malformed"] == 2
    finally:
        language.stop()


def test_parts_hold_only_their_own_weights(sdxl: Path, unet: Any, worker: Worker) -> None:
    whole = sum(parameter.numel() for parameter in pipeline(sdxl).unet.parameters())
    here = sum(parameter.numel() for parameter in unet.parameters())
    assert all(not parameter.is_meta for parameter in unet.parameters())
    assert here + worker._body.parameter_bytes // 4 == whole
    assert here < whole / 4
