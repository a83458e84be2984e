"""Split denoisers on a GPU: the same numbers as unsplit there, through a real worker process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import test_step_graphs
import torch
from test_step_graphs import Image, load_body, plainly

import tiny_diffusion
from fleet import running_broker
from split_common.system.process import running_command
from split_device import SplitUNet2DConditionModel
from split_worker.bodies.step_graphs import CAPTURED

pytestmark = pytest.mark.gpu

PLACE = "cuda"

#: What outputs may differ, as a share of the largest number: other kernels, and other batches.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _all_bits() -> Iterator[None]:
    """Convolutions in float32 keep all bits, which they do not by default."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unet") / "tiny"
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(**tiny_diffusion.SDXL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def unsplit(model: Path) -> Any:
    return diffusers.UNet2DConditionModel.from_pretrained(model).to(PLACE)


@pytest.fixture(scope="module")
def broker(model: Path) -> Iterator[str]:
    """Where a worker serves the model on the GPU."""
    options = ["--model", str(model), "--cut", "C", "--device", PLACE, "--dtype", "float32"]
    with (
        running_broker() as running,
        running_command(["worker", "--broker", running.address, *options], env={"NVIDIA_TF32_OVERRIDE": "0"}) as (
            _,
            facts,
        ),
    ):
        assert facts["device"] == PLACE
        yield running.address


def inputs(seed: int, place: str) -> dict[str, Any]:
    """A guided step of an image."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(place)

    return {
        "sample": random(2, 4, 16, 16),
        "timestep": 300 + seed,
        "encoder_hidden_states": random(2, tiny_diffusion.TOKENS, 2 * tiny_diffusion.TEXT),
        "added_cond_kwargs": {"text_embeds": random(2, tiny_diffusion.TEXT), "time_ids": random(2, 6)},
    }


def difference(unet: Any, unsplit: Any, seed: int = 0, place: str = PLACE) -> float:
    """From the unsplit output, as a share of its largest number."""
    with torch.no_grad():
        output = unet(**inputs(seed, place)).sample
        wanted = unsplit(**inputs(seed, PLACE)).sample
    assert output.device == unet.device
    assert wanted.std() > 0
    return float((output.to(PLACE) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("place", [PLACE, "cpu"])
def test_the_devices_blocks_run_on_a_gpu_or_not(broker: str, model: Path, unsplit: Any, place: str) -> None:
    with SplitUNet2DConditionModel.from_pretrained(model, broker=broker) as unet:
        unet.to(place)
        assert difference(unet, unsplit, place=place) <= TOLERANCE


def test_channels_last(broker: str, model: Path, unsplit: Any) -> None:
    with SplitUNet2DConditionModel.from_pretrained(model, broker=broker) as unet:
        unet.to(PLACE, memory_format=torch.channels_last)
        assert difference(unet, unsplit) <= TOLERANCE


def test_steps_that_are_replayed(broker: str, model: Path, unsplit: Any) -> None:
    """The worker captures a graph in the third of them."""
    with SplitUNet2DConditionModel.from_pretrained(model, broker=broker) as unet:
        unet.to(PLACE)
        assert max(difference(unet, unsplit, seed) for seed in range(CAPTURED + 5)) <= TOLERANCE


@pytest.mark.parametrize(("codec", "tolerance"), [("fp16", 1e-3), ("int8", 2e-2), ("int4", 0.2)])
def test_codecs(broker: str, model: Path, unsplit: Any, codec: str, tolerance: float) -> None:
    with SplitUNet2DConditionModel.from_pretrained(model, broker=broker, codec=codec) as unet:
        unet.to(PLACE)
        assert 0 < difference(unet, unsplit) <= tolerance


def test_two_devices_at_once(broker: str, model: Path, unsplit: Any) -> None:
    places = [PLACE, "cpu"]

    def denoise(number: int) -> float:
        with SplitUNet2DConditionModel.from_pretrained(model, broker=broker) as unet:
            unet.to(places[number])
            return max(difference(unet, unsplit, seed, places[number]) for seed in range(number, 20, 2))

    with ThreadPoolExecutor(2) as threads:
        assert max(threads.map(denoise, range(2))) <= TOLERANCE


@pytest.mark.parametrize("kind", test_step_graphs.KINDS)
def test_a_body_replays_what_it_would_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = load_body(kind, tmp_path, PLACE)
    images = [Image(body, kind), Image(body, kind)]
    keys = [image.condition(number) for number, image in enumerate(images)]
    assert body._graphs is not None
    graphs = body._graphs._graphs

    def check(*steps: int) -> None:
        """Of a launch: for each image the step's seed."""
        runs = [image.step(step, key) for image, key, step in zip(images, keys, steps, strict=False)]
        for output, wanted in zip(body.launch(runs).wait(), plainly(body, runs), strict=True):
            assert (output - wanted).abs().max() <= TOLERANCE * wanted.abs().max()

    for seed in range(CAPTURED + 2):
        check(seed)
    assert len(graphs) == 1
    for seed in range(CAPTURED + 2):
        check(seed, seed + 50)
    assert len(graphs) == 2
    # The first one again, whose memory the second one has used; and twice in one launch.
    check(90)
    monkeypatch.setattr("split_worker.bodies.denoiser.MAX_BATCH_ROWS", 2)
    check(91, 92)
    assert len(graphs) == 2


#: Captures fail, and the process goes on.
FAILING = f"""
import torch
from split_common.models.denoisers.spec import StepConditioning
from split_common.engine.graphs import new_capture
from split_worker.bodies.step_graphs import StepGraphs

def forward(tensors, conditioning):
    (states,) = tensors
    return states * states.sum().item() if len(states) in (3, 6) else states + 1

graphs = StepGraphs(forward, new_capture)
with torch.inference_mode():
    for size, captured in ((3, 0), (4, 1), (6, 1), (5, 2), (3, 2), (4, 2)):
        for number in range({CAPTURED} + 3):
            states = torch.full((size,), float(number), device="cuda")
            output = graphs.run([states], StepConditioning()).cpu()
            wanted = size * number**2 if size in (3, 6) else number + 1
            assert output.tolist() == [wanted] * size, (size, number, output)
        assert len(graphs._graphs) == captured, (size, captured)
assert torch.cuda.current_stream() == torch.cuda.default_stream()
"""


def test_a_capture_that_fails() -> None:
    subprocess.run([sys.executable, "-c", FAILING], check=True, timeout=300)
