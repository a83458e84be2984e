"""A denoiser's forwards as graphs: what is replayed depends on no number of Python's that was another one before.

The capture is CUDA's own; tests/worker/test_cuda_images.py has it. Here a graph computes anew each time that it is
replayed, from the tensors and numbers that it was captured with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny_diffusion
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.codecs import decode, encode
from split_common.models.denoisers.registry import read_denoiser_spec
from split_common.models.denoisers.spec import StepConditioning
from split_common.models.denoisers.unet import UNetSpec
from split_common.protocol import payloads
from split_worker.bodies.denoiser import DenoiserBody, DenoiserRun
from split_worker.bodies.held import ImageState
from split_worker.bodies.step_graphs import CAPTURED, MAX_COUNTED, MAX_GRAPHS, StepGraphs

KINDS = ["unet C", "unet A", "controlnet", "ip-adapter", "sd3", "flux"]
WIDTH = 2 * tiny_diffusion.TEXT
TEXT_TOKENS = 12


def load_body(kind: str, directory: Path, place: str = "cpu") -> DenoiserBody:
    """A tiny body with random weights."""
    torch.manual_seed(0)
    adapter = None
    if kind in ("sd3", "flux"):
        name = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}[kind]
        config = {"sd3": tiny_diffusion.SD3, "flux": tiny_diffusion.FLUX}[kind]
        getattr(diffusers, name)(**config).save_pretrained(directory)
    else:
        diffusers.UNet2DConditionModel(**tiny_diffusion.SDXL).save_pretrained(directory / "unet")
        if kind == "ip-adapter":
            adapter = tiny_diffusion.save_ip_adapter(directory / "ip.safetensors", directory)
        directory = directory / "unet"
    spec = read_denoiser_spec(Checkpoint.resolve(directory, ip_adapter=adapter))
    return DenoiserBody(spec, spec.split("A" if kind == "unet A" else "C"), torch.device(place), torch.float32)


@dataclass
class Image:
    """A session with random jobs and steps, of one shape if it is not told otherwise."""

    body: DenoiserBody
    kind: str
    size: int = 8
    count: int = 2
    channels_last: bool = False
    state: ImageState = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.body.new_state()

    def _random(self, seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def condition(self, seed: int, scale: float = 1.0, places: float = 1.0) -> bytes:
        """Tells the body of an image; its key."""
        key = bytes([seed]) * 32
        tensors, scales = [], []
        if self.kind == "flux":
            tokens = torch.arange(self.size**2 + TEXT_TOKENS)
            tensors = [torch.stack([tokens * 0, tokens // self.size * places, tokens % self.size], 1)[None].float()]
        elif self.kind != "sd3":
            tensors = [self._random(seed, self.count, TEXT_TOKENS, WIDTH)]
        if self.kind == "ip-adapter":
            tensors.append(self._random(seed + 100, self.count, 1, 4, WIDTH))
            spec = self.body._spec
            assert isinstance(spec, UNetSpec)
            scales = [scale] * len(spec.body_attentions(self.body._split))
        if tensors:
            arrays, data = zip(*map(encode, tensors), strict=True)
            self.body.begin(
                self.state, payloads.Conditioning(key, list(arrays), scales), memoryview(b"".join(data))
            )
        return key

    def step(self, seed: int, key: bytes) -> DenoiserRun:
        spec, split, count = self.body._spec, self.body._split, self.count
        if isinstance(spec, UNetSpec):
            residuals = spec.skip_shapes(split, self.size, self.size)
            shapes = [(count, *residuals[0]), (count, spec.embedding)]
            shapes += [(count, *shape) for shape in residuals] if self.kind == "controlnet" else []
        else:
            shapes = [(count, self.size**2, 32), (count, 32), (count, TEXT_TOKENS, 32)]
        tensors = [self._random(seed * 1000 + index, *shape) for index, shape in enumerate(shapes)]
        if self.channels_last:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        arrays, data = zip(*map(encode, tensors), strict=True)
        request = payloads.Denoise(None if self.kind == "sd3" else key, list(range(count)), list(arrays), "float32")
        (run,) = self.body.begin(self.state, request, memoryview(b"".join(data)))
        assert isinstance(run, DenoiserRun)
        return run


def plainly(body: DenoiserBody, runs: list[DenoiserRun]) -> list[torch.Tensor]:
    """The output without graphs."""
    graphs, body._graphs = body._graphs, None
    try:
        return body.launch(runs).wait()
    finally:
        body._graphs = graphs


@dataclass
class Captures:
    """In place of CUDA's capture. It fails as often as it is told to."""

    errors: list[Exception] = field(default_factory=list)
    memories: int = 0
    graphs: int = 0

    def __call__(self) -> Any:
        self.memories += 1
        return self.capture

    def capture(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.graphs += 1
        if self.errors:
            raise self.errors.pop()
        compute()
        return compute


def with_graphs(body: DenoiserBody, *errors: Exception) -> Captures:
    captures = Captures(list(errors))
    body._graphs = StepGraphs(body._blocks, captures)
    return captures


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> DenoiserBody:
    return load_body("unet A", tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module", params=KINDS)
def any_body(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DenoiserBody]:
    return request.param, load_body(request.param, tmp_path_factory.mktemp("body"))


def test_a_forward_reads_nothing_of_the_host(any_body: tuple[str, DenoiserBody]) -> None:
    """No tensor but its own, its weights and what it makes there; and no number of one of them."""
    kind, body = any_body
    image = Image(body, kind)
    run = image.step(1, image.condition(1))
    tensors, conditioning, weights = (
        [each.to("meta") for each in group]
        for group in (run.tensors, run.conditioning.tensors, body._blocks.state_dict().values())
    )
    state = dict(zip(body._blocks.state_dict(), weights, strict=True))
    with torch.no_grad(), OnlyOnMeta():
        torch.func.functional_call(
            body._blocks, state, (tensors, StepConditioning(tuple(conditioning), run.conditioning.scales))
        )


class OnlyOnMeta(TorchDispatchMode):
    """Fails for operations with tensors elsewhere; those that read a number of a tensor fail by themselves."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, output)) if isinstance(each, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), operation
        return output


def test_steps_and_jobs_of_one_shape_share_a_graph(any_body: tuple[str, DenoiserBody]) -> None:
    kind, body = any_body
    captures = with_graphs(body)
    image, other = Image(body, kind), Image(body, kind)
    keys = [image.condition(1), image.condition(2, places=2.0)]
    outputs = []
    for seed in range(CAPTURED + 4):
        run = image.step(seed, keys[seed % 2])
        (output,) = body.launch([run]).wait()
        assert torch.equal(output, plainly(body, [run])[0])
        outputs.append(output)
    assert captures.graphs == 1
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))
    # Of equal states with another conditioning, and of two images in one forward.
    assert torch.equal(body.launch([image.step(0, keys[1])]).wait()[0], outputs[0]) == (kind == "sd3")
    key = other.condition(1)
    for seed in range(CAPTURED + 2):
        runs = [image.step(seed, keys[0]), other.step(seed + 50, key)]
        assert all(map(torch.equal, body.launch(runs).wait(), plainly(body, runs)))
    assert captures.graphs == 2


def test_each_scale_of_an_ip_adapter_has_a_graph(tmp_path: Path) -> None:
    body = load_body("ip-adapter", tmp_path)
    captures = with_graphs(body)
    image = Image(body, "ip-adapter")
    keys = [image.condition(seed, scale) for seed, scale in enumerate((0.5, 0.0, 1.5))]
    for seed in range(3 * (CAPTURED + 1)):
        run = image.step(seed, keys[seed % 3])
        assert torch.equal(body.launch([run]).wait()[0], plainly(body, [run])[0])
    assert captures.graphs == 3


def test_layouts_and_sizes_do_not_share_a_graph_and_few_are_kept(unet: DenoiserBody) -> None:
    captures = with_graphs(unet)
    images = [Image(unet, "unet A", size) for size in range(2, 3 + MAX_GRAPHS)]
    images[1].channels_last = True
    images.append(Image(unet, "unet A", images[1].size))
    for image in images:
        key = image.condition(1)
        for seed in range(CAPTURED + 1):
            run = image.step(seed, key)
            assert torch.equal(unet.launch([run]).wait()[0], plainly(unet, [run])[0])
    assert captures.graphs == len(images) == MAX_GRAPHS + 2
    assert unet._graphs is not None
    assert len(unet._graphs._graphs) == MAX_GRAPHS
    assert captures.memories == 1


def test_sizes_that_come_once_are_not_captured_and_forgotten() -> None:
    captures = Captures()
    graphs = StepGraphs(lambda tensors, _: tensors[0] + 1, captures)
    for _ in range(CAPTURED + 1):
        for size in range(MAX_COUNTED + 10):
            assert torch.equal(graphs.run([torch.zeros(size)], StepConditioning()), torch.ones(size))
    assert captures.graphs == 0
    assert len(graphs._came) == MAX_COUNTED


def test_large_steps_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split_worker.bodies.step_graphs.MAX_GRAPH_BYTES", 40)
    captures = Captures()
    graphs = StepGraphs(lambda tensors, _: tensors[0] + 1, captures)
    for size in (8, 9):
        for _ in range(CAPTURED + 1):
            assert torch.equal(
                graphs.run([torch.zeros(size)], StepConditioning((torch.zeros(2),))), torch.ones(size)
            )
    assert captures.graphs == 1


def test_what_cannot_be_captured_runs_as_it_is(unet: DenoiserBody, caplog: pytest.LogCaptureFixture) -> None:
    captures = with_graphs(unet, RuntimeError("operation not permitted\nwhen stream is capturing"))
    image = Image(unet, "unet A")
    key = image.condition(1)
    for seed in range(3 * CAPTURED):
        run = image.step(seed, key)
        assert torch.equal(unet.launch([run]).wait()[0], plainly(unet, [run])[0])
    assert captures.graphs == 1
    assert [record.message.count("not permitted when") for record in caplog.records] == [1]


def test_without_memory_for_a_graph_all_are_dropped(unet: DenoiserBody) -> None:
    captures = with_graphs(unet)
    small, large = Image(unet, "unet A", 4), Image(unet, "unet A", 6)
    key = small.condition(1)
    assert unet._graphs is not None
    graphs = unet._graphs._graphs
    for seed in range(CAPTURED):
        unet.launch([small.step(seed, key)]).wait()
    assert len(graphs) == 1
    captures.errors.append(torch.OutOfMemoryError("CUDA out of memory"))
    key = large.condition(1)
    for seed in range(2 * CAPTURED):
        run = large.step(seed, key)
        assert torch.equal(unet.launch([run]).wait()[0], plainly(unet, [run])[0])
    assert not graphs
    key = small.condition(1)
    for seed in range(CAPTURED):
        unet.launch([small.step(seed, key)]).wait()
    # Memory in which a capture failed, or no graph is left, is not used again.
    assert (len(graphs), captures.graphs, captures.memories) == (1, 3, 3)


def test_a_forward_without_memory_takes_that_of_the_graphs() -> None:
    captures = Captures()
    calls: list[int] = []

    def forward(tensors: Any, _: StepConditioning) -> torch.Tensor:
        calls.append(len(tensors[0]))
        if len(tensors[0]) == 5 and (graphs._graphs or len(calls) > 10):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensors[0] * 2

    graphs = StepGraphs(forward, captures)
    for _ in range(CAPTURED):
        graphs.run([torch.ones(1)], StepConditioning())
    assert len(graphs._graphs) == 1
    assert torch.equal(graphs.run([torch.ones(5)], StepConditioning()), torch.ones(5) * 2)
    assert not graphs._graphs
    calls += [0] * 10
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run([torch.ones(5)], StepConditioning())


def test_what_surrounds_a_forward_takes_the_memory_of_the_graphs(
    unet: DenoiserBody, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_graphs(unet)
    assert unet._graphs is not None
    image = Image(unet, "unet A")
    key = image.condition(1)
    for seed in range(CAPTURED):
        unet.launch([image.step(seed, key)]).wait()
    assert len(unet._graphs._graphs) == 1

    def scarce(*args: Any) -> Any:
        assert unet._graphs is not None
        if unet._graphs._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*args)

    monkeypatch.setattr("split_worker.bodies.denoiser.decode", scarce)
    assert unet.launch([image.step(CAPTURED, key)]).wait()[0].isfinite().all()
    assert not unet._graphs._graphs
