"""Files of images: photos that an image begins with, and what a made one carries."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

import tiny_diffusion
from split_common.errors import ConfigError
from split_device.images.files import PARAMETERS, image_bytes, note, notes, read_image
from split_device.images.notices import add_notices, cut_off, describe
from split_device.images.settings import MAX_SIDE, ImageSettings


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype("uint8"))


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image, dtype=int)


# --- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_upright(tmp_path: Path, turn: int) -> None:
    photo, path = gradient(), tmp_path / "photo.jpg"
    exif = photo.getexif()
    exif[0x0112] = turn
    photo.save(path, exif=exif, quality=100)
    read = read_image(path)
    assert read.size == ((48, 32) if turn <= 4 else (32, 48))
    assert np.array_equal(pixels(read), pixels(load_image(str(path))))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr"])
def test_modes_are_read_as_diffusers_reads_them(tmp_path: Path, mode: str) -> None:
    image, path = gradient().convert(mode), tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    options = {}
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    if mode == "P":
        options["transparency"] = 3
    image.save(path, **options)
    read = read_image(path)
    assert read.mode == "RGB"
    assert np.array_equal(pixels(read), pixels(load_image(str(path))))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype("uint16")
    Image.fromarray(ramp).save(tmp_path / f"deep.{suffix}")
    read = pixels(read_image(tmp_path / f"deep.{suffix}"))
    assert np.abs(read[..., 0] - ramp / 257).max() <= 1
    assert (read[..., 0] == read[..., 2]).all()


def test_the_first_image_of_an_animation(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.gif").getpixel((3, 3)) == (255, 0, 0)


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    png = image_bytes(gradient())
    eps, floats, bomb = io.BytesIO(), io.BytesIO(), io.BytesIO()
    gradient().save(eps, "EPS")
    Image.new("F", (16, 16)).save(floats, "TIFF")
    Image.new("1", (MAX_SIDE + 1, 16)).save(bomb, "PNG")
    huge = bytearray(png)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    for name, content, word in (
        ("text", b"nothing", "expected one of PNG"),
        ("program", eps.getvalue(), "expected one of PNG"),
        ("cut", png[: len(png) // 2], "cannot be read"),
        ("empty", b"", "expected one of PNG"),
        ("floats", floats.getvalue(), "floating-point"),
        ("wide", bomb.getvalue(), f"{MAX_SIDE + 1}x16 pixels"),
        ("bomb", bytes(huge), "exceeds limit|60000x60000 pixels"),
        ("tiny", image_bytes(Image.new("RGB", (3, 3))), "3x3 pixels"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=word) as refused:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_image(tmp_path / "none")


# --- what a made image carries -----------------------------------------------------------------------------


def made() -> Any:
    image = gradient()
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(), guidance_scale=5.0)
    describe(image, pipeline, "seven, in grün — 七", ImageSettings(negative="blue", seed=2**64 - 1), {})
    return image


def test_a_png_carries_its_settings() -> None:
    with Image.open(io.BytesIO(image_bytes(made()))) as image:
        lines = image.info[PARAMETERS].splitlines()
    assert lines[:2] == ["seven, in grün — 七", "Negative prompt: blue"]
    assert lines[2].startswith("Steps: 20, Sampler: SimpleNamespace, CFG scale: 5.0, Seed: 18446744073709551615, ")
    assert "Size: 48x32" in lines[2]


@pytest.mark.parametrize("format_", ["JPEG", "WEBP"])
def test_other_formats_carry_them_as_a_comment(format_: str) -> None:
    with Image.open(io.BytesIO(image_bytes(made(), format_))) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be").startswith("seven, in grün — 七\nNegative prompt: blue\nSteps: 20")


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_they_may_be_left_out(format_: str) -> None:
    image = made()
    note(image, "seven was cut off")
    content = image_bytes(image, format_, metadata=False)
    assert b"seven" not in content
    assert "seven".encode("utf-16-be") not in content
    image.info.clear()
    assert content == image_bytes(image, format_)


def test_notes_stay_with_a_png() -> None:
    image = made()
    assert notes(image) == []
    note(image, "one\nline")
    note(image, "two")
    with Image.open(io.BytesIO(image_bytes(image))) as read:
        assert notes(read) == ["one line", "two"]


def test_the_end_of_a_prompt_that_no_encoder_has_room_for(tmp_path: Path) -> None:
    tokenizer = tiny_diffusion.tokenizer(tmp_path)
    pipeline = SimpleNamespace(
        tokenizer=tokenizer, text_encoder=object(), tokenizer_2=tokenizer, text_encoder_2=None
    )
    room = tiny_diffusion.TOKENS - 2
    assert cut_off(pipeline, "a" * room) == ""
    assert cut_off(pipeline, "a" * room + " blue").replace(" ", "") == "blue"
    # Another encoder has the whole of it.
    pipeline.text_encoder_2, pipeline.tokenizer_2 = object(), tiny_diffusion.tokenizer(tmp_path / "two")
    pipeline.tokenizer_2.model_max_length = 100
    assert cut_off(pipeline, "a" * room + " blue") == ""


def test_a_black_image_is_said_to_be_one(tmp_path: Path) -> None:
    image, pipeline = gradient(), SimpleNamespace()
    add_notices(image, pipeline, SimpleNamespace(nsfw_content_detected=[False]), "a", ImageSettings())
    assert notes(image) == []
    add_notices(image, pipeline, SimpleNamespace(nsfw_content_detected=[True]), "a", ImageSettings())
    assert "safety checker" in notes(image)[0]
