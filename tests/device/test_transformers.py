"""Transformers of SD 3 and Flux, split: the same numbers as unsplit, through a real queue and worker."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_diffusion import image, latents, lora_of, pipeline

import tiny
import tiny_diffusion
from fleet import TRANSPORTS_AT_NIGHT, running_broker, start_worker, using
from split_common.errors import InvalidSplit, Malformed, NonFinite, UnsupportedArchitecture, UnsupportedFeature
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.codecs import encode
from split_common.models.denoisers.registry import read_denoiser_spec
from split_common.models.split import Split
from split_common.protocol import payloads
from split_device import SplitFluxTransformer2DModel, SplitSD3Transformer2DModel, SplitUNet2DConditionModel
from split_worker.bodies.denoiser import DenoiserBody
from split_worker.worker import Worker
from wiretap import record_requests

#: How each kind's pipeline and split class are called, and a longest prompt that its pipeline may be told.
KINDS: dict[str, tuple[str, Any]] = {
    "sd3": ("StableDiffusion3", SplitSD3Transformer2DModel),
    "flux": ("Flux", SplitFluxTransformer2DModel),
}
SHORT = {"max_sequence_length": tiny_diffusion.TOKENS}


@pytest.fixture(scope="module", params=TRANSPORTS_AT_NIGHT)
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def broker(transport: str) -> Iterator[Any]:
    with running_broker() as running:
        yield running


@pytest.fixture(scope="module", params=["sd3", "flux"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = {"sd3": tiny_diffusion.save_sd3, "flux": tiny_diffusion.save_flux}[kind]
    return save(tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def worker(broker: Any, model: Path) -> Iterator[Worker]:
    running = start_worker(model, broker.address, cut="C")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def transformer(broker: Any, kind: str, model: Path, worker: Worker) -> Iterator[Any]:
    with KINDS[kind][1].from_pretrained(model, broker=broker.address) as made:
        yield made


def pipe_of(kind: str, model: Path, task: str = "", **parts: Any) -> Any:
    return pipeline(model, f"{KINDS[kind][0]}{task}Pipeline", **parts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"num_images_per_prompt": 2, "height": 48}, marks=pytest.mark.numbers),
        {"guidance_scale": 1.0},
    ],
    ids=["", "two images", "no guidance"],
)
def test_text_to_image(kind: str, model: Path, transformer: Any, options: dict[str, Any]) -> None:
    wanted, ours = (
        latents(pipe_of(kind, model, **parts), **SHORT, **options) for parts in ({}, {"transformer": transformer})
    )
    assert wanted.std() > 0
    assert torch.equal(ours, wanted)


def test_from_an_image(kind: str, model: Path, transformer: Any) -> None:
    options = {"image": image(), "strength": 0.7, **SHORT}
    wanted, ours = (
        latents(pipe_of(kind, model, "Img2Img", **parts), **options) for parts in ({}, {"transformer": transformer})
    )
    assert torch.equal(ours, wanted)


def test_flux_with_true_guidance(kind: str, model: Path, transformer: Any) -> None:
    if kind == "sd3":
        pytest.skip("has a guidance of its own")
    options = {"true_cfg_scale": 3.0, "negative_prompt": "blue", **SHORT}
    wanted, ours = (
        latents(pipe_of(kind, model, **parts), **options) for parts in ({}, {"transformer": transformer})
    )
    assert torch.equal(ours, wanted)


@pytest.mark.numbers
def test_cut_a(broker: Any, kind: str, model: Path) -> None:
    worker = start_worker(model, broker.address, cut="A")
    try:
        with KINDS[kind][1].from_pretrained(model, broker=broker.address, cut="A") as transformer:
            assert str(transformer.split) == "2:5"
            wanted, ours = (
                latents(pipe_of(kind, model, **parts), **SHORT) for parts in ({}, {"transformer": transformer})
            )
            assert torch.equal(ours, wanted)
            whole = sum(parameter.numel() for parameter in pipe_of(kind, model).transformer.parameters())
            here = sum(parameter.numel() for parameter in transformer.parameters())
            assert here + worker._body.parameter_bytes // 4 == whole
    finally:
        worker.stop()


def test_what_travels(
    kind: str, model: Path, transformer: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No embeddings of the text; for Flux the places of the tokens, once; and what is too large, in parts."""
    sent = record_requests(monkeypatch)
    monkeypatch.setattr(payloads, "PART_BYTES", 10_000)
    pipe = pipe_of(kind, model, transformer=transformer)
    wanted = latents(pipe_of(kind, model), **SHORT, height=32)
    assert torch.equal(latents(pipe, **SHORT, height=32), wanted)
    kinds = [type(request) for request in sent]
    assert kinds.count(payloads.Conditioning) == (kind == "flux")
    assert kinds.count(payloads.Denoise) == 4
    assert kinds.count(payloads.TensorPart) > 0
    assert kinds.count(payloads.PartRequest) > 0


def test_devices_share_forwards(broker: Any, kind: str, model: Path, worker: Worker) -> None:
    """Several images at once, of two sizes and of texts of two lengths: equal shapes are computed together."""
    options = [{"seed": 1}, {"seed": 2}, {"seed": 3, "height": 32}, {"seed": 4, "max_sequence_length": 8}]
    whole = pipe_of(kind, model)
    wanted = [latents(whole, **SHORT | each) for each in options]
    before = worker.counters["forwards"], worker.counters["rows"]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(options)) as pool:
        made = [stack.enter_context(KINDS[kind][1].from_pretrained(model, broker=broker.address)) for _ in options]
        pipes = [pipe_of(kind, model, transformer=each) for each in made]
        outputs = list(pool.map(lambda pipe, each: latents(pipe, **SHORT | each), pipes, options))
    for ours, expected in zip(outputs, wanted, strict=True):
        assert tiny.deviation(ours, expected) <= 1e-5
    assert worker.counters["rows"] - before[1] == 16
    assert worker.counters["forwards"] - before[0] < 16


@pytest.mark.parametrize(("codec", "least"), [("fp16", 70.0), ("int8", 40.0), ("int4", 15.0)])
def test_codecs_cost_little(broker: Any, kind: str, model: Path, worker: Worker, codec: str, least: float) -> None:
    wanted = latents(pipe_of(kind, model), **SHORT)
    with KINDS[kind][1].from_pretrained(model, broker=broker.address, codec=codec) as made:
        ours = latents(pipe_of(kind, model, transformer=made), **SHORT)
    error = (ours - wanted).pow(2).mean()
    assert error > 0
    assert 10 * torch.log10((wanted.max() - wanted.min()) ** 2 / error) >= least


def test_the_output_is_reused(broker: Any, kind: str, model: Path, worker: Worker) -> None:
    """What is reused is what the body adds to the tokens. Flux is called twice a step when it is guided."""
    options = {"num_inference_steps": 6, **SHORT}
    if kind == "flux":
        options |= {"true_cfg_scale": 3.0, "negative_prompt": "blue"}
    wanted = latents(pipe_of(kind, model), **options)
    with KINDS[kind][1].from_pretrained(model, broker=broker.address, reuse=2) as made:
        before = worker.counters["steps"]
        ours = latents(pipe_of(kind, model, transformer=made), **options)
    assert worker.counters["steps"] - before == {"sd3": 3, "flux": 6}[kind]
    assert 0 < (ours - wanted).abs().mean() < 0.2 * wanted.abs().mean()


def test_what_is_refused(kind: str, model: Path, transformer: Any, worker: Worker) -> None:
    rows, text = 1, 2 * tiny_diffusion.TEXT
    given: dict[str, Any] = {"encoder_hidden_states": torch.ones(rows, 4, text), "timestep": torch.ones(rows)}
    if kind == "sd3":
        states = torch.ones(rows, 4, 8, 8)
        given |= {"pooled_projections": torch.ones(rows, text)}
        control = {"block_controlnet_hidden_states": [states]}
        with pytest.raises(UnsupportedFeature, match="skipped"):
            transformer(states, **given, skip_layers=[3])
    else:
        states = torch.ones(rows, 16, 16)
        given |= {"pooled_projections": torch.ones(rows, tiny_diffusion.TEXT), "guidance": torch.ones(rows)}
        given |= {"txt_ids": torch.zeros(4, 3), "img_ids": torch.zeros(16, 3)}
        control = {"controlnet_block_samples": [states]}
    before = worker.counters["steps"]
    with pytest.raises(NonFinite):
        transformer(states / 0, **given)
    with pytest.raises(UnsupportedFeature, match="gradients"):
        transformer(states.clone().requires_grad_(), **given)
    with pytest.raises(UnsupportedFeature, match="ControlNet"):
        transformer(states, **given, **control)
    with pytest.raises(UnsupportedFeature, match="ip_hidden_states"):
        transformer(states, **given, joint_attention_kwargs={"ip_hidden_states": [states]})
    with pytest.raises(UnsupportedFeature, match="reuse"):
        transformer.enable_cache(None)
    with pytest.raises(UnsupportedFeature, match="save the original"):
        transformer.save_pretrained(model)
    with pytest.raises(UnsupportedArchitecture, match=r"is a \w+Transformer2DModel"):
        SplitUNet2DConditionModel.from_pretrained(model)
    save_file({"ip_adapter.1.to_k_ip.weight": torch.zeros(1)}, model.parent / "ip.safetensors")
    adapted = Checkpoint.resolve(model, ip_adapter=model.parent / "ip.safetensors")
    with pytest.raises(UnsupportedArchitecture, match="IP-Adapter"):
        read_denoiser_spec(adapted)
    assert worker.counters["steps"] == before


def test_a_lora(kind: str, model: Path, transformer: Any, tmp_path: Path) -> None:
    """On the device's blocks it is as unsplit; on the worker's it is refused."""
    with pytest.raises(UnsupportedFeature, match="which is on the worker"):
        pipe_of(kind, model, transformer=transformer).load_lora_weights(
            lora_of(pipe_of(kind, model), tmp_path, ["to_q"])
        )
    own = transformer.state_dict()
    assert own.keys() >= dict(transformer.named_parameters()).keys()
    assert pickle.loads(pickle.dumps(own)).keys() == own.keys()
    with pytest.raises(KeyError):
        own["nothing"]
    weights = lora_of(pipe_of(kind, model), tmp_path, r"transformer_blocks\.0\.ff\.net\.2")
    pipes = [pipe_of(kind, model), pipe_of(kind, model, transformer=transformer)]
    plain = latents(pipes[0], **SHORT)
    try:
        for pipe in pipes:
            pipe.load_lora_weights(dict(weights))
        wanted, ours = (latents(pipe, **SHORT) for pipe in pipes)
        assert torch.equal(ours, wanted)
        assert not torch.equal(wanted, plain)
    finally:
        pipes[1].unload_lora_weights()


# --- the worker, whatever a device sends -------------------------------------------------------------------

KEY = bytes(32)
TIME, IMAGE, TEXT = torch.ones(2, 32), torch.ones(2, 9, 32), torch.ones(2, 4, 32)


@pytest.mark.parametrize(
    "tensors",
    [
        (IMAGE, TIME),
        (IMAGE, TIME, TEXT, TEXT),
        (IMAGE[..., :31], TIME, TEXT),
        (IMAGE, TIME[..., :31], TEXT),
        (IMAGE, TIME, TEXT[..., :31]),
        (IMAGE, TIME[:1], TEXT),
        (IMAGE, TIME, TEXT[:1]),
        (IMAGE[..., None], TIME, TEXT),
        (TIME, TIME, TEXT),
        (IMAGE[:1], TIME[:1], TEXT[:1]),
    ],
    ids=lambda tensors: " ".join(str(list(tensor.shape)) for tensor in tensors),
)
def test_steps_that_do_not_fit_are_refused(kind: str, model: Path, tensors: tuple[torch.Tensor, ...]) -> None:
    spec = read_denoiser_spec(Checkpoint.resolve(model))
    body = DenoiserBody(spec, spec.split("C"), torch.device("cpu"))
    state = body.new_state()
    condition = None
    places, data = encode(torch.ones(1, 13, 3))
    if kind == "flux":
        condition = KEY
        for array in (payloads.Array("float32", [1, 13, 2]), payloads.Array("float32", [2, 13, 3])):
            with pytest.raises(Malformed, match="positions"):
                body.begin(state, payloads.Conditioning(KEY, [array]), memoryview(b""))
        body.begin(state, payloads.Conditioning(KEY, [places]), memoryview(data))
        shorter = [encode(tensor) for tensor in (IMAGE[:, 1:], TIME, TEXT)]
        step = payloads.Denoise(KEY, [0, 0], [array for array, _ in shorter], "float32")
        with pytest.raises(Malformed, match="where they are"):
            body.begin(state, step, memoryview(b"".join(data for _, data in shorter)))
    else:
        with pytest.raises(Malformed, match="none"):
            body.begin(state, payloads.Conditioning(KEY, [places]), memoryview(data))

    def send(*sent: torch.Tensor) -> Any:
        parts = [encode(tensor) for tensor in sent]
        step = payloads.Denoise(condition, [0, 0], [array for array, _ in parts], "float32")
        return body.begin(state, step, memoryview(b"".join(data for _, data in parts)))

    with pytest.raises(Malformed):
        send(*tensors)
    assert body.launch(send(IMAGE, TIME, TEXT)).wait()[0].shape == (2, 13, 32)


def test_bodies(kind: str, model: Path) -> None:
    spec = read_denoiser_spec(Checkpoint.resolve(model))
    assert str(spec.split("C")) == "1:6"
    assert str(spec.check(Split(7, 3, 4))) == "3:4"
    for first, last in ((0, 6), (1, 7)):
        with pytest.raises(InvalidSplit, match="some at each end"):
            spec.check(Split(7, first, last))
    mine, theirs = (set(spec.own_tensors(spec.split("A"), side)) for side in ("device", "worker"))
    assert not mine & theirs
    assert mine | theirs == set(spec.checkpoint.tensor_names)
