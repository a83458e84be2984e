"""Images of the HTTP server, as the real `openai` client sees them."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from playwright.sync_api import expect

import tiny
import tiny_diffusion
from chat_page import answered, chromium, faults, needs_chromium, opened, say, set_field, unlock
from serving import KEY, hanging_up, serving
from wiretap import wait_until

#: Seconds that something may take on a busy machine.
PATIENCE = 300.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """A server of a language model and an image model, and the worker of the latter."""
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny"))
    with serving(checkpoint, model) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[str, Any]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server[0], api_key=KEY, max_retries=0) as client:
        yield client


def image_of(entry: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def ask(client: openai.OpenAI, steps: int = 2, **options: Any) -> Any:
    options.setdefault("extra_body", {"steps": steps, "seed": 5})
    return client.images.generate(**{"model": "tiny-sdxl", "prompt": "a seven", **options})


def unsplit(model: Path, prompt: str, steps: int, seed: int, **options: Any) -> np.ndarray:
    return tiny_diffusion.picture(model, prompt, seed, steps, **options).astype(int)


def assert_same_picture(picture: Image.Image, wanted: np.ndarray) -> None:
    """Two processes may round differently, and so do steps of several images that share a forward."""
    assert np.abs(np.asarray(picture, int) - wanted).max() <= 1


@pytest.mark.numbers
def test_images_are_those_of_the_unsplit_model(client: openai.OpenAI, model: Path) -> None:
    one = ask(client, size="32x48", user="me", style="vivid")
    assert one.size == "32x48"
    assert_same_picture(image_of(one.data[0]), unsplit(model, "a seven", 2, 5, width=32, height=48))
    two = ask(client, n=2, output_format="webp", response_format="b64_json")
    first, second = map(image_of, two.data)
    assert (first.format, first.size) == ("WEBP", (64, 64))
    assert not np.array_equal(first, second)
    assert [entry.seed for entry in two.data] == [5, 6]
    drawn = ask(client, quality="low", extra_body={"guidance": 2, "negative_prompt": "blue"})
    wanted = unsplit(model, "a seven", 10, drawn.data[0].seed, guidance_scale=2.0, negative_prompt="blue")
    assert_same_picture(image_of(drawn.data[0]), wanted)


def test_a_stream_of_images(client: openai.OpenAI, model: Path) -> None:
    events = sorted(ask(client, n=2, stream=True), key=lambda event: event.index)
    assert [(event.type, event.seed, event.size) for event in events] == [
        ("image_generation.completed", 5, "64x64"),
        ("image_generation.completed", 6, "64x64"),
    ]
    for event in events:
        assert_same_picture(image_of(event), unsplit(model, "a seven", 2, event.seed))


def test_notes_and_metadata(client: openai.OpenAI) -> None:
    prompt, seed = "a photo of seven in blue", 2**64 - 1
    for metadata in (False, True):
        made = ask(client, prompt=prompt, extra_body={"steps": 2.0, "seed": seed, "metadata": metadata})
        assert "blue" in made.data[0].notes[0]
        assert made.data[0].seed == seed
        assert ("parameters" in image_of(made.data[0]).info) == metadata
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, extra_body={"seed": 2**64})
    assert refused.value.param == "seed"


def test_both_models_are_served(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-sdxl"]
    assert client.models.retrieve("tiny-sdxl").owned_by == "lambda-split"
    assert client.completions.create(model="tiny", prompt="Once", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"response_format": "url"}, "response_format", "not supported"),
        ({"background": "transparent"}, "background", "not supported"),
        ({"stream": True, "size": "33x31"}, "size", "a multiple of 8"),
        ({"partial_images": 1, "stream": True}, "partial_images", "not supported"),
        ({"n": 11}, "n", "<= 10"),
        ({"prompt": ""}, "prompt", "length >= 1"),
        ({"quality": "best"}, "quality", "Invalid enum value"),
        ({"size": "large"}, "size", "invalid size"),
        ({"size": "99999x99999"}, "size", "at most 4096"),
        ({"size": "1024x1024"}, "size", "1024x1024 is too large"),
        ({"size": "33x31"}, "size", "a multiple of 8"),
        ({"extra_body": {"mask": "x"}}, None, "unknown field"),
    ],
)
def test_errors_are_openai_s(client: openai.OpenAI, options: dict[str, Any], param: str | None, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, **options)
    assert bad.value.param == param
    assert said in bad.value.message
    assert bad.value.type == "invalid_request_error"


def test_other_models_and_keys_are_refused(client: openai.OpenAI) -> None:
    for name in ("tiny", "another"):
        with pytest.raises(
            openai.NotFoundError, match=r"the models here: tiny-sdxl, tiny \(for texts\)"
        ) as missing:
            ask(client, model=name)
        assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match=r"the models here: tiny, tiny-sdxl \(for images\)"):
        client.completions.create(model="tiny-sdxl", prompt="Once", max_tokens=2)
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="another"))


def test_many_at_once(server: tuple[str, Any], model: Path) -> None:
    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server[0], api_key=KEY, max_retries=0) as client:
            asked = (
                client.images.generate(prompt=f"number {index}", extra_body={"steps": 3, "seed": index})
                for index in range(6)
            )
            return list(await asyncio.gather(*asked))

    for index, made in enumerate(asyncio.run(all_of_them())):
        assert_same_picture(image_of(made.data[0]), unsplit(model, f"number {index}", 3, index))


def test_a_client_that_hangs_up_ends_its_images(server: tuple[str, Any]) -> None:
    url, worker = server
    body = {"prompt": "a seven", "n": 4, "steps": 1000}
    before = steps(worker)
    with hanging_up(f"{url}/images/generations", body, KEY):
        wait_until(lambda: steps(worker) > before, PATIENCE)
    wait_until(lambda: not len(worker._sessions), PATIENCE)
    # All four would have been far more.
    assert steps(worker) - before < 1000


@needs_chromium
def test_the_page_shows_a_picture_and_the_same_one_again(server: tuple[str, Any]) -> None:
    seed = 2**63 + 1  # Which JavaScript's numbers do not have.
    view = {"width": 360, "height": 560}
    with chromium() as browser, opened(browser, server[0].removesuffix("v1"), viewport=view) as page:
        unlock(page)
        expect(page.locator("#model")).to_have_text("tiny, tiny-sdxl")
        message = page.get_by_label("Message", exact=True)
        set_field(page, "picture-seed", seed)
        set_field(page, "picture-size", "64x256")
        set_field(page, "picture-steps", 3)
        message.fill("/image a seven")
        page.keyboard.press("Enter")
        answered(page)
        image = page.get_by_role("img", name="a seven")
        facts = re.compile(rf"^64x256 · 3 steps · \d+\.\d s · seed {seed}$")
        expect(page.locator("article.assistant .facts")).to_have_text(facts)
        assert image.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [64, 256]
        expect(page.locator("[data-last=steps]")).to_have_text("3")
        # It has been scrolled to: question and picture together are higher than what is seen of the conversation.
        ends = "(element) => [element.getBoundingClientRect().top, element.getBoundingClientRect().bottom]"
        (top, bottom), (log_top, log_bottom) = image.evaluate(ends), page.locator("#log").evaluate(ends)
        assert log_top <= top < bottom <= log_bottom
        assert page.locator("article.user").evaluate(ends)[0] < log_top
        first = image.get_attribute("src")
        for field in ("seed", "size", "steps"):
            set_field(page, f"picture-{field}", "")
        page.get_by_role("button", name="Same again").click()
        expect(page.get_by_text("2 of 2")).to_be_visible()
        answered(page)
        assert image.get_attribute("src") == first
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save the picture").click()
        assert saved.value.suggested_filename == f"picture-{seed}.png"
        assert f"data:image/png;base64,{base64.b64encode(saved.value.path().read_bytes()).decode()}" == first
        assert faults(page) == []


@needs_chromium
def test_what_asks_the_page_for_a_picture(server: tuple[str, Any]) -> None:
    with chromium() as browser, opened(browser, server[0].removesuffix("v1")) as page:
        unlock(page)
        message = page.get_by_label("Message", exact=True)
        message.fill("/image")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("Say what to show: /image a photo of a lighthouse")
        expect(message).to_have_value("/image")
        set_field(page, "picture-steps", 1000)
        message.fill("/image a seven")
        page.keyboard.press("Enter")
        wait_until(lambda: len(server[1]._sessions), PATIENCE)
        page.keyboard.press("Escape")
        # What came to nothing is not a version of the answer.
        expect(page.locator("article.assistant .facts")).to_have_text("stopped")
        wait_until(lambda: not len(server[1]._sessions), PATIENCE)
        set_field(page, "picture-steps", 1)
        page.get_by_role("button", name="Try again").click()
        answered(page)
        expect(page.get_by_role("img", name="a seven")).to_have_count(1)
        expect(page.get_by_text("2 of 2")).to_have_count(0)
        message.fill("")
        say(page, "/imagine")
        expect(page.locator("article.assistant .body").last).not_to_be_empty()
        expect(page.locator("article img")).to_have_count(1)


# The last two: they stop the worker, which later ones would need.


def test_a_stream_says_that_its_worker_is_gone(server: tuple[str, Any], model: Path) -> None:
    url, worker = server
    said = ""
    with httpx2.stream(
        "POST",
        f"{url}/images/generations",
        json={"prompt": "a seven", "steps": 1000, "stream": True},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=PATIENCE,
    ) as response:
        wait_until(lambda: len(worker._sessions), PATIENCE)
        worker.stop()
        for line in response.iter_lines():
            if "waiting 60 s for another one" in line:
                said = line
                break
    # It may have left between two steps, when nothing was asked of it.
    assert said.startswith((f": worker {worker.name} is gone: ", ": no worker is left: "))
    assert f"start one with `lambda-split worker --model {model}" in said


@needs_chromium
def test_the_page_says_that_a_picture_waits(server: tuple[str, Any], model: Path) -> None:
    server[1].stop()
    with chromium() as browser, opened(browser, server[0].removesuffix("v1")) as page:
        unlock(page)
        page.get_by_label("Message", exact=True).fill("/image a seven")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text(f"start one with `lambda-split worker --model {model}")
        expect(page.get_by_role("status")).to_have_text("Waiting …")
        page.keyboard.press("Escape")
        expect(page.locator("article.assistant .facts")).to_have_text("stopped")


def steps(worker: Any) -> int:
    return int(worker._compute.counters["steps"])
