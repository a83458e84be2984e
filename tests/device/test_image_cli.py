"""`lambda-split image` and `lambda-split worker --cut`, as commands."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
import tiny_diffusion
from fleet import running_broker, start_worker
from split_common.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def options(model: Path) -> Iterator[list[str]]:
    with running_broker() as broker:
        worker = start_worker(model, broker.address, cut="C")
        yield ["--broker", broker.address, "--model", str(model), "--steps", "3", "--seed", "1"]
        worker.stop()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def test_an_image_is_made(options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "a seven", "-o", str(tmp_path / "a.png"), *options]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"{tmp_path / 'a.png'}: 64x64, seed 1, ")
    assert out.endswith(" 3 calls of the worker\n")
    assert "a.png" not in err
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o600
    again = ["image", "a seven", "-o", str(tmp_path / "b.png"), "--codec", "int8", "--reuse", "2", "--json"]
    assert main([*again, *options]) == 0
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    report = json.loads(line)
    assert (report["width"], report["height"], report["seed"], report["calls"]) == (64, 64, 1, 2)
    one, two = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert one.std() > 0
    assert np.abs(one - two).mean() < np.abs(one - one.mean()).mean()


@pytest.mark.parametrize("save", [tiny_diffusion.save_sd3, tiny_diffusion.save_flux])
def test_an_image_of_a_transformer(
    save: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path)
    with running_broker() as broker:
        worker = start_worker(model, broker.address, cut="A")
        options = ["--broker", broker.address, "--model", str(model), "--cut", "A", "--steps", "3"]
        assert main(["image", "a seven", "-o", str(tmp_path / "a.png"), "--size", "64", *options]) == 0
        assert pixels(tmp_path / "a.png").std() > 0
        worker.stop()
        capfd.readouterr()
        main(["doctor", "--broker", broker.address, "--model", str(model), "--json"])
    findings = json.loads(capfd.readouterr().out)["findings"]
    (about,) = [finding for finding in findings if finding["subject"] == "model"]
    assert about["status"] == "ok"
    assert "cut A (blocks 2:5)" in about["detail"]


def test_weights_of_a_variant(
    model: Path, options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files of half the size, as many pipelines have; the worker has the same numbers in its own."""
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("*model.safetensors"))
    with running_broker() as broker:
        worker = start_worker(tmp_path / "half", broker.address, cut="C")
        arguments = [
            "--broker",
            broker.address,
            "--model",
            str(tmp_path / "half"),
            "--dtype",
            "float32",
            *options[4:],
        ]
        assert main(["image", "a seven", "-o", str(tmp_path / "a.png"), *arguments]) == 0
        worker.stop()
    assert main(["image", "a seven", "-o", str(tmp_path / "b.png"), *options]) == 0
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).mean() < 2


def test_an_image_begins_with_another_one(options: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    Image.new("RGB", (48, 64), "red").save(first)
    more = ["--init-image", str(first), "--strength", "0.7", "--negative", "blue", "--guidance", "3"]
    assert main(["image", "a seven", "-o", str(second), *more, *options]) == 0
    assert pixels(second).shape == (64, 48, 3)


def test_a_photo_is_upright_and_a_prompt_that_is_cut_off_is_noted(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photo = Image.new("RGB", (64, 48), "red")
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=exif)
    prompt = "a photo of seven in blue"
    more = ["--init-image", str(tmp_path / "photo.jpg"), "--strength", "0.7", *options]
    assert main(["image", prompt, "-o", str(tmp_path / "a.png"), *more, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["width"], report["height"]) == (48, 64)
    (said,) = report["notes"]
    assert "blue" in said
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"].startswith(f"{prompt}\nSteps: 3, Sampler: EulerDiscreteScheduler, ")
        assert "Seed: 1, Size: 48x64, Denoising strength: 0.7" in image.info["parameters"]
    assert main(["image", prompt, "-o", str(tmp_path / "b.png"), *more, "--no-metadata"]) == 0
    assert "blue" in capfd.readouterr().err
    with Image.open(tmp_path / "b.png") as image:
        assert not image.info
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


def test_a_prompt_comes_from_stdin_and_its_image_goes_to_stdout(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["image", "a seven", "-o", "./-.png", *options]) == 0
    capfdbinary.readouterr()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a seven")))
    assert main(["image", "-", "-o", "-", *options]) == 0
    out, err = capfdbinary.readouterr()
    assert out == Path("-.png").read_bytes()
    assert re.search(rb"(?m)^stdout: 64x64, seed 1, .* 3 calls of the worker$", err)


def test_an_image_goes_into_a_pipe_and_not_over_its_input(options: list[str], tmp_path: Path) -> None:
    fifo, first = tmp_path / "fifo", tmp_path / "first.png"
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    assert main(["image", "a seven", "-o", str(fifo), *options]) == 0
    reader.join()
    Image.open(io.BytesIO(read[0])).save(first)
    before = first.read_bytes()
    assert main(["image", "a seven", "-o", str(first), "--init-image", str(first), *options]) == 2
    assert first.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "a.txt"], 2, "invalid image file"),
        (["-o", "nowhere/a.png"], 2, "not a directory"),
        (["-o", "a.png", "--size", "big"], 2, "invalid size"),
        (
            ["-o", "a.png", "--size", "32x33"],
            2,
            "cannot make an image with a side of 33 px: expected a multiple of 8",
        ),
        (["-o", "a.png", "--size", "8192"], 2, "at most 4096"),
        (
            ["-o", "a.png", "--size", "1024"],
            2,
            "1024x1024 is too large for tiny-sdxl, which was made for 64x64: workers take at most 65,536 pixels",
        ),
        (["-o", "/proc/a.png"], 2, "cannot be written"),
        (["-o", "a.png", "--init-image", "gone.png"], 2, "cannot be read as an image: No such file"),
        (["-o", "a.png", "--init-image", "gone.png", "--strength", "0"], 2, "changes nothing"),
        (["-o", "a.png", "--strength", "0.5"], 2, "--strength needs --init-image"),
        (["-o", "a.png", "--init-image", "gone.png", "--size", "32"], 2, "the initial image has a size"),
        (["-o", "a.png", "--model", "/proc"], 2, "not the directory of a pipeline"),
        (["-o", "a.png", "--cut", "A"], 1, "no worker serves tiny-sdxl blocks "),
        (["-o", "a.png", "--cut", "A"], 1, "): start one with `lambda-split worker --model "),
        (["-o", "a.png", "--reuse", "1.5"], 2, "number of steps"),
        (["-o", "a.png", "--reuse", "often"], 2, "expected a number of steps"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: list[str],
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["image", "a seven", *options, *arguments]) == code
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.iterdir())


def test_a_worker_takes_one_way_to_say_model_and_cut(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["worker", "--model", str(model), "--cut", "C", "--layers", "1:-1"]) == 2
    assert "give one of them" in capfd.readouterr().err
    assert main(["worker", "--model", str(model), "--layers", "0:-1"]) == 2
    assert "from each end" in capfd.readouterr().err
    assert main(["worker", "--image-model", str(model), "--layers", "3:99"]) == 2
    assert "--layers 3:99 is not a part of a model of 7 blocks" in capfd.readouterr().err
    assert main(["worker", "--image-model", str(model), "--model", str(model)]) == 2
    assert "give either --model or --image-model" in capfd.readouterr().err
    text = tiny.save("llama", tmp_path / "text")
    assert main(["worker", "--image-model", str(text)]) == 2
    assert f"--image-model is for diffusion models, which {text} is not" in capfd.readouterr().err
