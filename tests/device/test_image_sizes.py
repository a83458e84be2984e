"""Sizes that a pipeline cannot make are refused by its configuration alone: nothing is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from split_common.errors import ConfigError
from split_common.models.denoisers.sizes import MAX_PIXELS
from split_device import ImageDevice, ImageSettings
from split_device.images.settings import check_pixels, check_size

DIGITS = {"_class_name": "UNet2DConditionModel", "sample_size": 8}
SDXL = {"_class_name": "UNet2DConditionModel", "sample_size": 128}
SD3 = {"_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "pos_embed_max_size": 192}
FLUX = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}


def pipeline(directory: Path, config: dict[str, Any], levels: int = 4) -> str:
    part = "unet" if config["_class_name"].startswith("UNet") else "transformer"
    for name, content in (("vae", {"block_out_channels": [8] * levels}), (part, config)):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(content))
    (directory / "model_index.json").write_text("{}")
    return str(directory)


@pytest.mark.parametrize(
    ("config", "levels", "size", "said"),
    [
        (DIGITS, 3, (32, 32), None),
        (DIGITS, 3, (512, 512), None),
        (DIGITS, 3, (1024, 1024), "made for 32x32: workers take at most 262,144 pixels"),
        (DIGITS, 3, (8192, 8), "a side of 8192 px: expected a multiple of 8, at most 4096"),
        (SDXL, 4, (2048, 2048), None),
        (SDXL, 4, (2048, 2056), "2048x2056 is too large"),
        # One side alone: the other one is the model's own.
        (SDXL, 4, (4096, None), None),
        (DIGITS, 3, (4096, None), None),
        (SD3, 4, (3072, 1024), None),
        (SD3, 4, (3088, 1024), "a side of 3088 px: expected a multiple of 16, at most 3072"),
        # Its configuration does not say that it was made for 1024x1024; its text counts, too.
        (FLUX, 4, (1024, 1024), None),
        (FLUX, 4, (2048, 2064), "made for 1024x1024"),
    ],
)
def test_a_size_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], levels: int, size: tuple[int, int | None], said: str | None
) -> None:
    directory, settings = pipeline(tmp_path, config, levels), ImageSettings(width=size[0], height=size[1])
    if said is None:
        check_size(directory, settings)
        return
    with pytest.raises(ConfigError, match=said):
        check_size(directory, settings)
    with pytest.raises(ConfigError, match=said):
        ImageDevice(directory).submit("a", settings=settings)


def test_the_limit_can_be_raised_and_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = pipeline(tmp_path, SDXL)
    check_pixels(directory, 1024, 1024)
    monkeypatch.setenv(MAX_PIXELS, str(1024**2 - 1))
    with pytest.raises(ConfigError, match="1024x1024 is too large"):
        check_pixels(directory, 1024, 1024)
    monkeypatch.setenv(MAX_PIXELS, str(4096**2))
    check_size(directory, ImageSettings(width=4096, height=4096))
    monkeypatch.setenv(MAX_PIXELS, "many")
    with pytest.raises(ConfigError, match="expected a number of pixels"):
        check_pixels(directory, 8, 8)
