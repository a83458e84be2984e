"""Processes that are forked beside an open model: they are refused at once, and the parent goes on."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GenerationConfig

import tiny
import tiny_diffusion
from fleet import serving_here, split_model
from split_common.errors import ForkedProcess
from split_device import Generator
from split_device.generation.generator import Request
from split_device.images.pipeline import ImagePipeline
from split_device.images.settings import ImageSettings
from split_device.jobs.store import Store
from split_device.models.registry import load_denoiser

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

#: Seconds after which a child that has not ended hangs.
PATIENCE = 300.0


def in_child(*calls: Callable[[], Any]) -> list[str]:
    """What each call does in a forked child: the name of its error, or nothing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(read)
            names = []
            for call in calls:
                try:
                    call()
                    names.append("")
                except BaseException as error:
                    names.append(type(error).__name__)
            os.write(write, pickle.dumps(names))
        os._exit(0)
    os.close(write)
    try:
        assert select.select([read], [], [], PATIENCE)[0], "the child hangs"
        data = os.read(read, 65536)
        return pickle.loads(data) if data else ["the child crashed"]
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_forked_child_is_refused_and_its_parent_goes_on(transport: str, tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path / "tiny")
    prompt = torch.randint(2, tiny.VOCABULARY, (1, 5))
    request = Request(prompt[0].tolist(), GenerationConfig(max_new_tokens=3, do_sample=False))
    with split_model(directory) as model, Generator(model) as generator:
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
        cache = model(prompt, use_cache=True).past_key_values

        def further() -> Any:
            return model(prompt[:, :1], past_key_values=cache).logits

        refused = [
            lambda: model.generate(prompt, max_new_tokens=3),
            lambda: model(prompt),
            further,
            lambda: model.get_decoder()(prompt),
            lambda: generator.submit(request),
        ]
        assert in_child(*refused) == [ForkedProcess.__name__] * len(refused)
        assert in_child(cache.reset, gc.collect, generator.close, model.close) == [""] * 4
        assert further().shape == (1, 1, tiny.VOCABULARY)
        assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
        assert generator.submit(request).result() == expected[0, 5:8].tolist()


def test_a_data_loader_beside_a_model(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path / "tiny")
    data = torch.randint(2, tiny.VOCABULARY, (6, 5))
    with split_model(directory) as model:
        loader = DataLoader(list(data), batch_size=2, num_workers=2, multiprocessing_context="fork")
        split = torch.cat([model.generate(batch, max_new_tokens=3, do_sample=False) for batch in loader])
    assert torch.equal(split, tiny.build("llama").generate(data, max_new_tokens=3, do_sample=False))


def test_an_image_model_in_a_forked_child(tmp_path: Path) -> None:
    directory = tiny_diffusion.save_sdxl(tmp_path / "sdxl")
    with (
        serving_here(directory, cut="C") as address,
        load_denoiser(directory, broker=address) as denoiser,
    ):
        pipeline = ImagePipeline(str(directory), denoiser)
        settings = ImageSettings(steps=2, seed=1)
        calls = (
            lambda: pipeline.generate("a seven", settings),
            lambda: pipeline.start("a seven", settings),
            lambda: denoiser(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 4, 8)),
        )
        assert in_child(*calls) == [ForkedProcess.__name__] * 3
        assert pipeline.generate("a seven", settings).size == (64, 64)


def test_a_store_of_jobs_in_a_forked_child(tmp_path: Path) -> None:
    with Store(tmp_path / "state" / "jobs.db") as store:
        assert in_child(store.jobs, store.count, store.close) == [ForkedProcess.__name__] * 2 + [""]
        assert store.jobs() == []
