"""The chat page, in a real browser."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import tiny
from serving import KEY, Unsplit, serving

#: Milliseconds that something may take on a busy machine.
PATIENCE = 300_000

POSITIONS = 4096

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and there is none on the PATH")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # So many positions that nobody generates them all while a test waits for something else.
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.save_tokenizer(tiny.save("llama", directory, max_position_embeddings=POSITIONS))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """The page's address, and the worker that answers."""
    with serving(checkpoint) as (url, worker):
        yield url.removesuffix("v1"), worker


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox", "--disable-gpu"]
        )
        expect.set_options(timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: tuple[str, Any]) -> Iterator[Page]:
    """The page, unlocked. In the end nothing was asked of anybody else, and nothing went wrong unseen."""
    context = browser.new_context(viewport={"width": 360, "height": 700})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Security" in message.text else None)
    page.goto(server[0])
    expect(page.get_by_label("asks for its API key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    context.close()
    assert not wrong
    assert asked
    assert all(url.startswith((server[0], "data:")) for url in asked), asked


def say(page: Page, text: str, most_tokens: int = 8) -> None:
    page.locator("#max-tokens").evaluate("(field, value) => { field.value = value }", str(most_tokens))
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> Any:
    return page.locator("article.assistant .body")


@needs_chromium
def test_a_conversation(page: Page, checkpoint: Path) -> None:
    unsplit = Unsplit(checkpoint)
    say(page, "Hello")
    expect(page.get_by_role("status")).to_have_text("Answered.")
    first = unsplit.say("user:Hello</s>assistant:", 8)
    assert answers(page).all_text_contents() == [first]
    expect(page.locator("article.assistant .facts")).to_have_text(
        # The page counts what the server says, and measures the time itself.
        re.compile(r"^8 tokens · \d+\.\d tokens/s · first after \d+\.\d\d s · cut off there$")
    )
    say(page, "<b>more</b>")
    expect(answers(page)).to_have_count(2)
    expect(page.get_by_role("status")).to_have_text("Answered.")
    prompt = f"user:Hello</s>assistant:{first}</s>user:<b>more</b></s>assistant:"
    assert answers(page).nth(1).text_content() == unsplit.say(prompt, 8)
    assert page.locator("article.user .body").nth(1).text_content() == "<b>more</b>"
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    say(page, "Hello")
    expect(page.get_by_role("status")).to_have_text("Answered.")
    assert answers(page).all_text_contents() == [first]


@needs_chromium
def test_what_runs_where_and_what_left(page: Page, server: tuple[str, Any]) -> None:
    page.get_by_text("Where it runs").click()
    assert page.locator("#parts > *").all_inner_texts() == [
        *("head", "layers 0–1", "this device"),
        *("body", "layers 2–3", "a worker"),
        *("tail", "layers 4–5", "this device"),
    ]
    assert page.locator("#layers i").count() == 6
    before = traffic(server[0])
    page.get_by_label("Message").focus()
    say(page, "Hello")
    expect(page.get_by_role("status")).to_have_text("Answered.")
    # The prompt and seven of the eight tokens have been through the worker.
    expect(page.locator("[data-last=steps]")).to_have_text("8")
    expect(page.locator("[data-all=steps]")).to_have_text(str(before["steps"] + 8))
    for direction in ("sent", "received"):
        expect(page.locator(f"[data-last=bytes_{direction}]")).to_contain_text("kB")
    assert traffic(server[0])["bytes_sent"] > before["bytes_sent"]


def traffic(server: str) -> dict[str, int]:
    answer: dict[str, Any] = httpx2.get(f"{server}split", headers={"Authorization": f"Bearer {KEY}"}).json()
    return dict(answer["traffic"])


@needs_chromium
@pytest.mark.parametrize("by", ["button", "key"])
def test_an_answer_is_stopped(page: Page, server: tuple[str, Any], by: str) -> None:
    say(page, "Hello", 4000)
    expect(answers(page)).not_to_be_empty()
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator("article.assistant .facts")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    deadline = time.monotonic() + PATIENCE / 1000
    while len(server[1]._sessions):
        assert time.monotonic() < deadline, "the session is still there"
        time.sleep(0.02)
    # It goes on with what there is.
    say(page, "Go on")
    expect(page.get_by_role("status")).to_have_text("Answered.")


@needs_chromium
def test_errors_are_shown_and_the_question_comes_back(page: Page) -> None:
    page.get_by_label("Message").fill("x" * POSITIONS)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("leave no room in the model's")
    expect(page.get_by_label("Message")).to_have_value("x" * POSITIONS)
    expect(answers(page)).to_have_count(0)
    page.get_by_label("Message").fill("")
    page.context.set_offline(True)
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text("The server does not answer.")
    page.context.set_offline(False)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Answered.")
    expect(page.get_by_role("alert")).to_be_hidden()


@needs_chromium
def test_a_wrong_key(browser: Browser, server: tuple[str, Any]) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(server[0])
        expect(page.get_by_label("asks for its API key")).to_be_focused()
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server refused this key.")
        expect(page.get_by_label("asks for its API key")).to_be_focused()
        assert page.evaluate("localStorage.length") == 0


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_it_fits_and_can_be_read(browser: Browser, server: tuple[str, Any], scheme: Any, width: int) -> None:
    with browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 640}) as context:
        page = context.new_page()
        page.goto(server[0])
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = luminance(page, "body", "backgroundColor")
        assert (ground < 0.5) == (scheme == "dark")
        for selector in ("h1", "#empty", ".note"):
            darker, lighter = sorted((ground, luminance(page, selector, "color")))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector


def luminance(page: Page, selector: str, property_: str) -> float:
    """Relative luminance of a colour, as WCAG defines it."""
    colour = page.locator(selector).evaluate("(element, name) => getComputedStyle(element)[name]", property_)
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(number) / 255 for number in re.findall(r"\d+", colour))
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_page_is_public_and_strict(server: tuple[str, Any]) -> None:
    for path in ("", "chat.css", "chat.js"):
        answer = httpx2.get(f"{server[0]}{path}")
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
    assert httpx2.get(f"{server[0]}split").status_code == 401
