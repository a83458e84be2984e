"""Jobs that make images: submitted, run by an agent that may be killed, and come back for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

import tiny_diffusion
from fleet import serving_here
from split_common.errors import ConfigError
from split_device import ImageDevice
from split_device.images.pipeline import _private_copy
from split_device.jobs.agent import log_path, running_agent
from split_device.jobs.job import ImageTask, InitImage
from split_device.jobs.store import Store, store_path
from wiretap import wait_until

#: Seconds that something in another process may take on a busy machine.
PATIENCE = 300.0

pytestmark = pytest.mark.usefixtures("state")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    """A broker and a worker of the tiny model."""
    with serving_here(model, cut="C") as running:
        yield running


def assert_same_picture(picture: np.ndarray, wanted: np.ndarray) -> None:
    """Two processes may round differently, and so do steps of two images that share a forward."""
    assert picture.shape == wanted.shape
    assert np.abs(picture.astype(int) - wanted.astype(int)).max() <= 1


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def steps_of(id_: str) -> int:
    with Store(store_path()) as store:
        return store.get(id_).steps


def last_job() -> str:
    with Store(store_path()) as store:
        return store.jobs(limit=1)[0].id


def test_from_submission_to_the_image(run: Any, model: Path, address: str, tmp_path: Path) -> None:
    asked = ("submit", "--image", "a seven", "--image-model", model, "--steps", 3, "--seed", 5)
    early = run(*asked, "--size", 48, "--guidance", 3, "--negative", "blue", "--key", "one", "--json")
    assert "no agent is running" in early.err
    assert (early.json["kind"], early.json["state"], early.json["steps"]) == ("image", "queued", 0)
    id_ = early.json["id"]
    refused = run("jobs", "result", id_, "-o", tmp_path / "a.png")
    assert (refused.code, refused.err) == (1, f"error: {id_} is queued\n")

    run("agent", "start", "--broker", address, "--give-up", 1)
    assert "the image is made" in run("jobs", "watch", id_).err
    assert run("jobs", "result", id_, "-o", tmp_path / "a.png", "--json").json["output"] == str(tmp_path / "a.png")
    expected = tiny_diffusion.picture(
        model, "a seven", 5, 3, height=48, width=48, guidance_scale=3.0, negative_prompt="blue"
    )
    assert_same_picture(pixels(tmp_path / "a.png"), expected)
    again = run(*asked, "--size", 48, "--guidance", 3, "--negative", "blue", "--key", "one")
    assert again.out.strip() == id_
    assert "asks for something else" in run(*asked, "--key", "one").err

    waited = run(*asked, "--wait", "-o", tmp_path / "b.webp", "--json").json
    assert (waited["state"], waited["steps"], waited["seed"]) == ("succeeded", 3, 5)
    assert pixels(tmp_path / "b.webp").shape == (64, 64, 3)
    assert "makes an image: give -o FILE" in run("jobs", "result", id_).err
    assert "3 of 3 steps" in run("jobs", "list").out
    assert "kind: image" in run("jobs", "show", id_).out
    wrong = run(*asked, "--size", "32x33", "--wait")
    assert (wrong.code, wrong.err) == (
        2,
        f"error: {model.name} cannot make an image with a side of 33 px: expected a multiple of 8, at most 4096\n",
    )
    with pytest.raises(ConfigError, match="a multiple of 8"):
        ImageDevice(model).submit("a seven", height=0)
    first = tmp_path / "first.png"
    Image.new("RGB", (48, 64), "red").save(first)
    begun = (*asked, "--init-image", first, "--strength", 0.7)
    assert run(*begun, "--wait", "-o", tmp_path / "c.png").code == 0
    with Image.open(first) as image:
        wanted = StableDiffusionXLImg2ImgPipeline.from_pretrained(model)(
            "a seven",
            image=image,
            strength=0.7,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(5),
        ).images[0]
    assert_same_picture(pixels(tmp_path / "c.png"), np.asarray(wanted))
    assert f"init image: {first}\nstrength: 0.7\n" in run("jobs", "show", last_job()).out
    run("agent", "stop")
    changed = run(*begun).out.strip()
    first.write_bytes(first.read_bytes() + b"\0")
    run("agent", "start", "--broker", address, "--give-up", 1)
    assert f"{first} has changed since the job was submitted" in run("jobs", "watch", changed).err

    nobody = run(*asked, "--cut", "A", "--wait")
    assert (nobody.code, "failed: no worker" in nobody.err) == (1, True)
    assert "waiting: no worker" in log_path().read_text()
    assert "seven" not in log_path().read_text()
    assert run("jobs", "prune", "--older-than", "0s", "--json").json == {"removed": 5, "batches": 0}
    with Store(store_path()) as store:
        assert store._db.execute("SELECT count(*) FROM images").fetchone()[0] == 0


@pytest.mark.long
def test_a_killed_agent_makes_the_same_image(run: Any, model: Path, address: str) -> None:
    """Two images of many steps at once, neither with a seed of its own; one is cancelled and tried again."""
    asked = ("--image", "--image-model", model, "--steps", 40)
    ids = [run("submit", *asked, prompt).out.strip() for prompt in ("a seven", "an eight")]
    pid = run("agent", "start", "--broker", address, "--json").json["pid"]
    wait_until(lambda: all(steps_of(id_) > 5 for id_ in ids), PATIENCE)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: running_agent() is None, PATIENCE)
    run("agent", "start", "--broker", address)
    for _ in range(5):
        wait_until(lambda: steps_of(ids[1]) > 5, PATIENCE)
        # On a busy machine it may be done by now.
        if run("jobs", "cancel", ids[1]).code == 0:
            break
        ids[1] = run("submit", *asked, "an eight").out.strip()
    assert "was cancelled" in run("jobs", "watch", ids[1]).err
    run("jobs", "retry", ids[1])
    for id_, prompt in zip(ids, ("a seven", "an eight"), strict=True):
        made = run("jobs", "watch", id_, "--json").json
        with Store(store_path()) as store:
            image = store.image(id_)
        path = store_path().with_name("image.png")
        path.write_bytes(image)
        assert_same_picture(pixels(path), tiny_diffusion.picture(model, prompt, made["seed"], 40))


@pytest.mark.long
def test_a_sealed_store_and_python(run: Any, model: Path, address: str, tmp_path: Path) -> None:
    key = tmp_path / "store.key"
    device = ImageDevice(model, store_key=key, codec="fp16")
    run("agent", "start", "--broker", address, "--store-key", key)

    async def both() -> list[Any]:
        one = device.submit("a seven", steps=2, seed=1)
        return await asyncio.gather(one, device.submit("an eight", steps=2, width=32, height=48))

    first, second = asyncio.run(both())
    wanted = tiny_diffusion.picture(model, "a seven", 1, 2).astype(int)
    assert np.abs(np.asarray(first, int) - wanted).mean() < 1
    assert second.size == (32, 48)
    images = device.generate_many(["a seven", "an eight"], steps=2, seed=1, timeout=PATIENCE)
    assert_same_picture(np.asarray(images[0]), np.asarray(first))
    assert images[1].size == (64, 64)
    with Store(store_path(), key) as store:
        assert all(job.request_id == job.id and len(job.session or "") == 8 for job in store.jobs())
    run("agent", "stop")
    kept = b"".join(path.read_bytes() for path in store_path().parent.glob("jobs.db*"))
    assert b"seven" not in kept
    assert b"PNG" not in kept


def test_images_at_once_share_weights_and_nothing_that_changes(model: Path) -> None:
    """A tokenizer that two threads use at once pads the one's prompt as the other wants it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    own = _private_copy(pipeline)
    shared = {name for name, part in pipeline.components.items() if getattr(own, name) is part}
    assert pipeline.components.keys() - shared == {"tokenizer", "tokenizer_2", "scheduler"}
    half = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float16)
    assert _private_copy(half).vae is not half.vae


def test_each_line_begins_with_the_same_image(run: Any, model: Path, tmp_path: Path) -> None:
    first, source = tmp_path / "first.png", tmp_path / "in.jsonl"
    Image.new("RGB", (48, 64), "red").save(first)
    source.write_text('{"prompt": "a", "seed": 1}\n{"prompt": "b", "size": "32x32"}\n{"prompt": "c", "steps": 1}\n')
    asked = ("submit", "--each-line", source, "--image", "--image-model", model, "--init-image", first)
    done = run(*asked, "--strength", 0.5, "--json")
    assert [error["message"] for error in done.json["errors"]] == [
        "line 2: an initial image and a size do not go together: the initial image has a size",
        "line 3: a strength of 0.5 changes nothing in 1 steps",
    ]
    with Store(store_path()) as store:
        task = store.get(done.json["ids"][0]).task
    assert isinstance(task, ImageTask)
    assert isinstance(task.init_image, InitImage)
    assert (task.init_image.path, task.init_image.strength) == (str(first), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("submit", "--image", "a seven"), "no image model: give --image-model"),
        (("submit", "--image", "a seven", "--image-model", "/nowhere"), "is not the directory of a pipeline"),
        (("submit", "--image", "a seven", "--max-tokens", 3), "--max-tokens is for texts"),
        (("submit", "a seven", "--steps", 3), "--steps needs --image"),
        (("submit", "a seven", "--image-model", "/nowhere"), "--image-model needs --image"),
        (("submit", "a seven", "--strength", 0.5), "--strength needs --image"),
        (("submit", "--image", "a seven", "--reuse", "often"), "expected a number of steps"),
        (("submit", "--image", "a seven", "-o", "a.png"), "-o needs --wait"),
        (("submit", "--image", "a seven", "-o", "a.txt", "--wait"), "invalid image file"),
        (("submit", "--image", "a seven", "-o", "a.png", "--wait"), "nothing was submitted, because no agent is"),
    ],
)
def test_wrong_usage_is_one_line(run: Any, arguments: tuple[Any, ...], message: str) -> None:
    done = run(*arguments)
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.count("\n") == 1


def test_an_image_model_has_an_old_option(run: Any) -> None:
    done = run("submit", "--image", "a seven", "--model", "/nowhere")
    assert "warning: with --image, --model is an old name: use --image-model" in done.err
    assert "/nowhere is not the directory of a pipeline" in done.err
