"""An IP-Adapter on a split UNet: its weights are on both sides, and the images' embeddings travel once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_diffusion import latents, pipeline
from test_image_steps import GOOD, KEY, WIDTH, begin, encode

import tiny_diffusion
from fleet import TRANSPORTS_IN_TURN, running_broker, start_worker, using
from split_common.cli import main
from split_common.errors import Malformed, MissingTensor, NoWorker, UnknownModel, UnsupportedFeature
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.registry import read_denoiser_spec
from split_common.protocol import payloads
from split_common.trust.fleet import load_fleet
from split_device import SplitUNet2DConditionModel
from split_worker.bodies.denoiser import DenoiserBody
from split_worker.worker import Worker


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def adapter(sdxl: Path) -> Path:
    return tiny_diffusion.save_ip_adapter(sdxl.parent / "ip.safetensors", sdxl)


@pytest.fixture(scope="module", params=TRANSPORTS_IN_TURN)
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def broker(transport: str) -> Iterator[Any]:
    with running_broker() as running:
        yield running


@pytest.fixture(scope="module")
def cut(transport: str) -> str:
    return {"zmq": "C", "redis": "A"}[transport]


@pytest.fixture(scope="module")
def worker(broker: Any, sdxl: Path, adapter: Path, cut: str) -> Iterator[Worker]:
    running = start_worker(sdxl, broker.address, cut=cut, ip_adapter=adapter)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def unet(broker: Any, sdxl: Path, adapter: Path, worker: Worker, cut: str) -> Iterator[SplitUNet2DConditionModel]:
    with SplitUNet2DConditionModel.from_pretrained(
        sdxl, broker=broker.address, ip_adapter=adapter, cut=cut
    ) as model:
        yield model


def load(pipe: Any, adapter: Path) -> None:
    pipe.load_ip_adapter(adapter.parent, subfolder="", weight_name=adapter.name, image_encoder_folder=None)
    tiny_diffusion.frozen(pipe)


def embeddings(seed: int = 0) -> list[torch.Tensor]:
    """Of two images, and of none for the negative."""
    images = torch.randn(1, 2, tiny_diffusion.IMAGE, generator=torch.Generator().manual_seed(seed))
    return [torch.cat([torch.zeros_like(images), images])]


@pytest.mark.numbers
def test_equal_to_unsplit_at_any_scale_and_without(sdxl: Path, adapter: Path, unet: Any) -> None:
    pipes = [pipeline(sdxl), pipeline(sdxl, unet=unet)]
    plain = latents(pipes[0])
    assert torch.equal(latents(pipes[1]), plain)
    for pipe in pipes:
        load(pipe, adapter)
    outputs = [plain]
    style = {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 0.7, 0.0]}}
    for scale in (0.3, 0.0, style):
        for pipe in pipes:
            pipe.set_ip_adapter_scale(scale)
        wanted, ours = (latents(pipe, ip_adapter_image_embeds=embeddings()) for pipe in pipes)
        assert torch.equal(ours, wanted)
        assert all(torch.equal(ours, other) == (scale == 0.0 and other is plain) for other in outputs)
        outputs.append(ours)
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.5)
    options = {"guidance_scale": 1.0, "num_images_per_prompt": 2}
    images = [embedding[1:] for embedding in embeddings(1)]
    wanted, ours = (latents(pipe, ip_adapter_image_embeds=images, **options) for pipe in pipes)
    assert torch.equal(ours, wanted)
    for pipe in pipes:
        pipe.unload_ip_adapter()
    assert torch.equal(latents(pipes[1]), plain)


def test_what_travels_and_what_each_side_holds(
    sdxl: Path, adapter: Path, unet: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(sdxl, unet=unet)
    load(pipe, adapter)
    try:
        before = worker.counters["steps"]
        latents(pipe, ip_adapter_image_embeds=embeddings(2))
        assert worker.counters["steps"] == before + 4
        whole = sum(tensor.numel() for tensor in load_file(adapter).values())
        unsplit = sum(parameter.numel() for parameter in pipeline(sdxl).unet.parameters())
        here = sum(parameter.numel() for parameter in unet.parameters())
        assert here + worker._body.parameter_bytes // 4 == unsplit + whole
        masks = {"ip_adapter_masks": [torch.ones(1, 2, 64, 64)]}
        with pytest.raises(UnsupportedFeature, match="cross_attention_kwargs"):
            latents(pipe, ip_adapter_image_embeds=embeddings(), cross_attention_kwargs=masks)
    finally:
        pipe.unload_ip_adapter()


def test_another_adapter_is_refused(
    sdxl: Path, adapter: Path, broker: Any, unet: Any, cut: str, tmp_path: Path
) -> None:
    tensors = load_file(adapter)
    name = "ip_adapter.5.to_v_ip.weight"
    other = tmp_path / "other.safetensors"
    save_file(tensors | {name: tensors[name] + 1}, other)
    with pytest.raises(UnsupportedFeature, match=name):
        load(pipeline(sdxl, unet=unet), other)
    # A worker of other weights is none for this device, nor is one that has an adapter for a device without.
    save_file(tensors | {"image_proj.proj.bias": tensors["image_proj.proj.bias"] + 1}, other)
    with (
        SplitUNet2DConditionModel.from_pretrained(
            sdxl, broker=broker.address, ip_adapter=other, cut=cut
        ) as strange,
        pytest.raises(NoWorker),
    ):
        latents(pipeline(sdxl, unet=strange))
    with SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker.address, cut=cut) as without:
        pipe = pipeline(sdxl, unet=without)
        with pytest.raises(UnsupportedFeature, match="--ip-adapter"):
            load(pipe, adapter)
        with pytest.raises(NoWorker):
            latents(pipe)


def test_what_is_no_adapter(sdxl: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="not a file"):
        Checkpoint.resolve(sdxl, ip_adapter=tmp_path / "gone")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UnknownModel, match="no IP-Adapter"):
        Checkpoint.resolve(sdxl, ip_adapter=tmp_path / "other.safetensors")
    tensors = load_file(adapter)
    del tensors["ip_adapter.5.to_k_ip.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    spec = read_denoiser_spec(Checkpoint.resolve(sdxl, ip_adapter=tmp_path / "short.safetensors"))
    with pytest.raises(MissingTensor, match="to_k_ip"):
        spec.load_blocks(spec.split("C"))


def test_jobs_that_do_not_fit_the_adapter_are_refused(sdxl: Path, adapter: Path) -> None:
    spec = read_denoiser_spec(Checkpoint.resolve(sdxl, ip_adapter=adapter))
    body = DenoiserBody(spec, spec.split("C"), torch.device("cpu"))
    state = body.new_state()

    def send(shapes: list[list[int]], scales: list[float]) -> None:
        parts = [encode(torch.ones(shape)) for shape in shapes]
        arrays, data = [array for array, _ in parts], b"".join(data for _, data in parts)
        assert body.begin(state, payloads.Conditioning(KEY, arrays, scales), memoryview(data)) == []

    text, images = [1, 4, WIDTH], [1, 1, 4, WIDTH]
    count = len(spec.body_attentions(spec.split("C")))  # type: ignore[attr-defined]
    for shapes, scales in (
        ([text, images], [1.0] * (count - 1)),
        ([text], [1.0] * count),
        ([text, images, images], [1.0] * 2 * count),
        ([text, [1, 4, WIDTH]], [1.0] * count),
        ([text, [1, 1, 4, WIDTH - 1]], [1.0] * count),
        ([text, [2, 1, 4, WIDTH]], [1.0] * count),
        ([text, images], [float("nan")] * count),
    ):
        with pytest.raises(Malformed):
            send(shapes, scales)
    send([text, images], [1.0] * count)
    (run,) = begin(body, state, [0], *GOOD)
    assert body.launch([run]).wait()[0].shape == (1, 64, 16, 16)


def test_a_fleet_lists_the_adapter_with_the_model(
    sdxl: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = ["--keys", str(tmp_path / "fleet")]
    assert main(["keys", "init", *keys]) == 0
    assert main(["keys", "add-model", str(sdxl), *keys]) == 0
    assert main(["keys", "add-model", str(sdxl), "--ip-adapter", str(adapter), *keys]) == 0
    plain, adapted = load_fleet(tmp_path / "fleet").manifests()
    assert (plain.name, adapted.name) == ("tiny-sdxl", "tiny-sdxl+ip")
    assert adapted.tensors.keys() - plain.tensors.keys() == load_file(adapter).keys()
    assert main(["worker", "--model", str(sdxl / "text_encoder"), "--ip-adapter", str(adapter)]) == 2
