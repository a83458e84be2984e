"""Many requests at once, some with images: each gets the tokens that the unsplit model gives it alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import tiny
import tiny_vision
from fleet import running_broker, serving_here, split_model, start_worker
from split_common.errors import ConfigError, UnsupportedFeature
from split_device import SplitModelForImageTextToText
from split_device.generation.generator import Generator, Request
from split_device.generation.local_layers import LocalLayers
from wiretap import LATE

pytestmark = pytest.mark.usefixtures("patient_queue")

Model = Any

#: Kinds that the shorter tests run: a plain one, one with spans, and one with axes and features between layers.
FIRST = ("llava", "gemma3", "qwen3_vl")

TEXT = [5, 17, 33, 4, 61, 12, 80, 7, 29, 44, 3]


@pytest.fixture(
    scope="module",
    params=[kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.long) for kind in tiny_vision.KINDS],
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    """A model, and the same model split."""
    checkpoint = tiny_vision.save(request.param, tmp_path_factory.mktemp(request.param))
    with (
        serving_here(checkpoint) as broker,
        SplitModelForImageTextToText.from_pretrained(checkpoint, broker=broker) as split,
    ):
        yield tiny_vision.build(request.param), split


def greedy(tokens: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, suppress_tokens=[0, *range(90, 97)])


def shown(kind: str, images: int, seed: int, tokens: int = 8) -> Request:
    """A request of one row, with this many images."""
    given = tiny_vision.inputs(kind, images, seed=seed)
    rows = len(given["input_ids"])
    row = {
        name: tensor[:1]
        if tensor.shape[:2] == given["input_ids"].shape
        else tensor[: len(tensor) * images // (images + 1)]
        for name, tensor in given.items()
    }
    assert rows == 2
    prompt = row.pop("input_ids")[0].tolist()
    row.pop("attention_mask")
    return Request(prompt, greedy(tokens), images=row)


def alone(model: Model, request: Request) -> list[int]:
    """What the unsplit model generates for one request."""
    ids = torch.tensor([request.prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=request.config, **request.images
    )
    return output[0, len(request.prompt) :].tolist()


def mixed(kind: str) -> list[Request]:
    """Requests with no image, one, two and three."""
    texts = [Request(TEXT[: 11 - more], greedy(12)) for more in (0, 2, 5)]
    images = [
        shown(kind, count, seed, tokens) for count, seed, tokens in ((1, 1, 8), (2, 2, 12), (3, 3, 5), (1, 4, 8))
    ]
    return [request for pair in zip(images, [*texts, texts[0]], strict=True) for request in pair]


@pytest.mark.numbers
def test_images_and_texts_together(both: tuple[Model, Model]) -> None:
    full, split = both
    asked = mixed(full.config.model_type)
    with Generator(split) as generator:
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == [alone(full, request) for request in asked]
        assert generator.counters["tail_rows"] > generator.counters["tail_forwards"]


def test_what_texts_need_alone_is_packed(both: tuple[Model, Model]) -> None:
    """The copy that embeds texts has a few of the model's weights, and the model keeps them all."""
    _, split = both
    before = sum(parameter.numel() for parameter in split.parameters())
    local = LocalLayers(split).ends._model
    tower = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert sum(parameter.numel() for parameter in local.parameters()) < before - tower
    assert sum(parameter.numel() for parameter in split.parameters()) == before


def test_continuing(both: tuple[Model, Model]) -> None:
    """A request that was interrupted goes on with its images."""
    full, split = both
    request = shown(full.config.model_type, 2, 5)
    wanted = alone(full, request)
    with Generator(split) as generator:
        again = Request(request.prompt, request.config, generated=wanted[:3], images=request.images)
        assert generator.submit(again).result(LATE) == wanted


@pytest.mark.parametrize("kind", ["gemma3", pytest.param("qwen3_vl", marks=pytest.mark.long)])
def test_a_worker_dies(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_vision.save(kind, tmp_path)
    full, asked, decoding = tiny_vision.build(kind), mixed(kind), threading.Event()
    with running_broker() as broker:
        workers = [start_worker(checkpoint, broker.address)]
        try:
            with (
                SplitModelForImageTextToText.from_pretrained(checkpoint, broker=broker.address) as split,
                Generator(split) as generator,
            ):
                generations = [generator.submit(request, lambda *_: decoding.set()) for request in asked]
                assert decoding.wait(LATE)
                workers.append(start_worker(checkpoint, broker.address))
                workers.pop(0).stop()
                assert [each.result(LATE) for each in generations] == [alone(full, request) for request in asked]
        finally:
            for worker in workers:
                worker.stop()


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_model_for_texts(tmp_path: Path) -> None:
    checkpoint = tiny.save("llama", tmp_path)
    with (
        split_model(checkpoint) as model,
        Generator(model) as generator,
        pytest.raises(ConfigError, match="takes no images"),
    ):
        generator.submit(shown("llava", 1, 1))


def test_what_does_not_fit(tmp_path: Path) -> None:
    """Other requests go on."""
    checkpoint = tiny_vision.save("qwen3_vl", tmp_path)
    full, request = tiny_vision.build("qwen3_vl"), shown("qwen3_vl", 2, 1)
    fewer = Request(request.prompt, request.config, images=shown("qwen3_vl", 1, 1).images)
    with (
        running_broker() as broker,
        SplitModelForImageTextToText.from_pretrained(
            checkpoint, broker=broker.address, head_layers=1, tail_layers=2
        ) as split,
        Generator(split) as generator,
    ):
        worker = start_worker(checkpoint, broker.address, "1:-2")
        try:
            with pytest.raises(UnsupportedFeature, match=r"a head of at least 2 layers"):
                generator.submit(request).result(LATE)
            with pytest.raises(ConfigError, match="the model refuses these images"):
                generator.submit(fewer).result(LATE)
            text = Request(TEXT, greedy(5))
            assert generator.submit(text).result(LATE) == alone(full, text)
        finally:
            worker.stop()
