"""The chat page in a real browser, for tests."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from starlette.applications import Starlette

from serving import KEY
from split_device.serving import page as chat_page
from split_device.serving.listener import listening, running_server
from wiretap import wait_until

#: Milliseconds that something may take on a busy machine.
PATIENCE = 300_000

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and there is none on the PATH")

#: Finds what keeps people with a screen reader or a keyboard from using a page.
AXE = Path(__file__).parent / "vendor" / "axe.js"


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox", "--disable-gpu"]
        )
        expect.set_options(timeout=PATIENCE)
        yield browser
        browser.close()


@contextlib.contextmanager
def files_alone() -> Iterator[str]:
    """The address of a server that has the page's files and nothing else."""
    with listening(0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with running_server(Starlette(routes=chat_page.routes()), listener, threading.Event()):
            yield address


@contextlib.contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """The page, as it is opened. In the end nothing was asked of anybody else, and nothing went wrong unseen."""
    options.setdefault("viewport", {"width": 360, "height": 700})
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Security" in message.text else None)
    page.goto(address)
    yield page
    context.close()
    assert not wrong
    assert asked
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked


def unlock(page: Page) -> Page:
    expect(page.get_by_label("asks for its API key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).not_to_be_empty()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    return page


def set_field(page: Page, name: str, value: object) -> None:
    """Fills a field of the settings, whether they are open or not."""
    page.locator(f"#{name}").evaluate(
        "(field, value) => { field.value = value; field.dispatchEvent(new Event('change', {bubbles: true})) }",
        str(value),
    )


def say(page: Page, text: str, most_tokens: int = 8) -> None:
    """Sends a message that is answered greedily."""
    set_field(page, "max-tokens", most_tokens)
    set_field(page, "temperature", 0)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def answered(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text("Answered.")


def answers(page: Page) -> Locator:
    return page.locator("article.assistant .body")


def faults(page: Page) -> list[str]:
    """What axe finds wrong, in the page as it is now."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]


def fits(page: Page) -> bool:
    """Whether nothing has to be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


#: The conversation that changed last, as the browser keeps it.
_KEPT = """() => new Promise((resolve, reject) => {
  const request = indexedDB.open("lambda-split", 1);
  request.onerror = () => reject(request.error);
  request.onsuccess = () => {
    const all = request.result.transaction("conversations").objectStore("conversations").getAll();
    all.onsuccess = () => resolve(all.result.sort((a, b) => a.updated.localeCompare(b.updated)).at(-1) ?? null);
  };
})"""


def kept(page: Page) -> list[str]:
    """The texts of the conversation that was held last, from its first message to the one that is shown last."""
    conversation = page.evaluate(_KEPT)
    texts: list[str] = []
    index = conversation["leaf"] if conversation else -1
    while index >= 0:
        node = conversation["nodes"][index]
        texts.insert(0, node["text"])
        index = node["parent"]
    return texts


def wait_until_kept(page: Page, *texts: str) -> None:
    wait_until(lambda: kept(page) == list(texts), PATIENCE / 1000)


#: What has a place of its own on the page, and may be too wide for it; of each kind more than one.
RICH = """# Title

A **word**, `code`, [a link](https://example.org), and a long one: {long}

- one
- two

| first | second | third |
| --- | --- | ---: |
| {long} | 2 | 3 |

```python
print("{long}")
```

$$\\sum_{{i=0}}^n x_i = {long}$$

> quoted

| a | b |
| --- | --- |
| 1 | 2 |

```python
pass
```
""".format(long="x" * 300)


def conversation(*texts: str) -> dict[str, Any]:
    """A file of one conversation, as the page exports it."""
    nodes = [
        {"parent": index - 1, "role": "assistant" if index % 2 else "user", "text": text}
        for index, text in enumerate(texts)
    ]
    held = {"id": "0" * 32, "created": "2026-01-02T03:04:05Z", "updated": "2026-01-02T03:04:05Z"}
    conversations = [held | {"leaf": len(nodes) - 1, "nodes": nodes}]
    return {"format": "lambda-split conversations", "version": 1, "conversations": conversations}


def read_in(page: Page, file: object) -> None:
    content = {"name": "chats.json", "mimeType": "application/json", "buffer": json.dumps(file).encode()}
    page.locator("#import-file").set_input_files(content)


def reached(page: Page) -> set[str]:
    """The ids of what the Tab key reaches."""
    found = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        found.add(page.evaluate("document.activeElement.id"))
    return found
