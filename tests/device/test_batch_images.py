"""Batches of images: one file per line, and a file of answers that names them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_diffusion
from fleet import serving_here


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    """A broker and a worker of the tiny model."""
    with serving_here(model, cut="C") as running:
        yield running


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def assert_same_picture(picture: np.ndarray, wanted: np.ndarray) -> None:
    """Steps of two images that share a forward may round differently."""
    assert picture.shape == wanted.shape
    assert np.abs(picture.astype(int) - wanted.astype(int)).max() <= 1


def test_prompts_and_requests_become_pictures(run: Any, model: Path, address: str, tmp_path: Path) -> None:
    source, pictures = tmp_path / "in.jsonl", tmp_path / "pictures"
    lines = [{"prompt": "a seven", "id": "seven", "seed": 5}, {"prompt": "a six"}, {"prompt": "x", "size": "33"}]
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options = ("--image-model", model, "--broker", address, "--output-dir", pictures)
    asked = ("batch", source, "--image", "--steps", 2, *options)
    done = run(*asked, "--json")
    assert (done.code, done.json["errors"], done.json["output"]) == (1, 1, str(pictures / "results.jsonl"))
    records = [json.loads(line) for line in (pictures / "results.jsonl").read_text().splitlines()]
    assert [(record["id"], record["prompt"], record["file"]) for record in records] == [
        ("seven", "a seven", "seven.png"),
        ("2", "a six", "00002.png"),
        ("3", None, None),
    ]
    assert "expected a multiple of 8" in records[2]["error"]["message"]
    assert_same_picture(pixels(pictures / "seven.png"), tiny_diffusion.picture(model, "a seven", 5, 2))
    assert_same_picture(
        pixels(pictures / "00002.png"), tiny_diffusion.picture(model, "a six", records[1]["seed"], 2)
    )
    with Image.open(pictures / "seven.png") as image:
        assert "a seven" in image.info["parameters"]

    # Nothing is made again but what failed.
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:2]))
    again = run(*asked, "--json")
    assert (again.code, again.json["resumed"], again.json["tokens"]) == (0, 2, 0)

    # Files that are there already are not replaced.
    body = {"prompt": "a one", "seed": 3, "steps": 2, "output_format": "webp"}
    request = {"custom_id": "seven", "url": "/v1/images/generations", "body": body}
    source.write_text(json.dumps(request))
    (pictures / "seven.webp").write_text("mine")
    refused = run("batch", source, *options, "-o", tmp_path / "out.jsonl")
    assert (refused.code, "seven.webp exists already" in refused.err) == (2, True)
    assert (pictures / "seven.webp").read_text() == "mine"
    assert run("batch", source, *options, "-o", tmp_path / "out.jsonl", "--overwrite").code == 0
    (record,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert record["response"]["body"]["data"] == [{"file": "seven.webp", "seed": 3}]
    assert pixels(pictures / "seven.webp").shape == (64, 64, 3)

    missing = run("batch", source, "-o", tmp_path / "new.jsonl", "--image-model", model)
    assert (missing.code, "line 1 asks for an image: give --output-dir" in missing.err) == (2, True)
