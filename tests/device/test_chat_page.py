"""The chat page, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, Route, expect

import tiny
from chat_page import (
    PATIENCE,
    RICH,
    answered,
    answers,
    chromium,
    conversation,
    faults,
    fits,
    kept,
    needs_chromium,
    opened,
    reached,
    read_in,
    say,
    set_field,
    unlock,
    wait_until_kept,
)
from serving import KEY, Unsplit, serving
from split_common import errors
from split_device.serving import page as chat_page
from wiretap import wait_until

POSITIONS = 4096


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # So many positions that nobody generates them all while a test waits for something else.
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.save_tokenizer(tiny.save("llama", directory, max_position_embeddings=POSITIONS))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """The page's address, and the worker that answers."""
    # Without drafts, the number of steps follows from that of tokens.
    with serving(checkpoint, options=["--speculate", "off"]) as (url, worker):
        yield url.removesuffix("v1"), worker


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: tuple[str, Any]) -> Iterator[Page]:
    """The page, unlocked."""
    with opened(browser, server[0]) as page:
        yield unlock(page)


@needs_chromium
def test_a_conversation(page: Page, checkpoint: Path) -> None:
    unsplit = Unsplit(checkpoint)
    say(page, "Hello")
    answered(page)
    first = unsplit.say("user:Hello</s>assistant:", 8)
    wait_until_kept(page, "Hello", first)
    expect(page.locator("article.assistant .facts")).to_have_text(
        # The page counts what the server says, and measures the time itself.
        re.compile(r"^8 tokens · \d+\.\d tokens/s · first after \d+\.\d\d s · cut off at")
    )
    say(page, "<b>more</b>")
    expect(answers(page)).to_have_count(2)
    answered(page)
    prompt = f"user:Hello</s>assistant:{first}</s>user:<b>more</b></s>assistant:"
    wait_until_kept(page, "Hello", first, "<b>more</b>", unsplit.say(prompt, 8))
    assert page.locator("article.user .body").nth(1).text_content() == "<b>more</b>"
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    say(page, "Hello")
    answered(page)
    wait_until_kept(page, "Hello", first)
    # With a schema, the answer is a form.
    set_field(page, "schema", '["yes"')
    page.keyboard.type("Well?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("JSON Schema of answers: a JSON Schema, or nothing.")
    page.get_by_label("Message", exact=True).fill("")
    page.get_by_label("Message", exact=True).focus()
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    set_field(page, "schema", json.dumps(schema | {"additionalProperties": False}))
    say(page, "Well?", 60)
    expect(page.locator("article.assistant dl.form dt")).to_have_text("yes")
    expect(page.locator("article.assistant dl.form dd")).to_have_text(re.compile("^(true|false)$"))
    assert faults(page) == []


@needs_chromium
@pytest.mark.long
def test_thinking_is_folded_and_calls_of_tools_are_shown(page: Page) -> None:
    """What a model thinks comes before its answer, and is shown on demand. It is not sent back, but calls are."""
    asked: list[Any] = []
    calls: list[Any] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        deltas: list[Any] = [{"role": "assistant", "reasoning_content": "Hm, "}, {"reasoning_content": "yes."}]
        deltas += [{"tool_calls": [each]} for each in calls] or [{"content": "Hello!"}]
        events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        events[-1]["choices"][0]["finish_reason"] = "tool_calls" if calls else "stop"
        details = {"cached_tokens": 1200}
        usage = {"completion_tokens": 3, "total_tokens": 1300, "prompt_tokens_details": details}
        lines = [f"data: {json.dumps(event)}\n\n" for event in (*events, {"choices": [], "usage": usage})]
        route.fulfill(content_type="text/event-stream", body="".join([*lines, "data: [DONE]\n\n"]))

    page.route("**/v1/chat/completions", answer)
    say(page, "Hello")
    answered(page)
    thinking = page.locator("article.assistant .thinking")
    expect(thinking.locator("div")).to_be_hidden()
    thinking.locator("summary").click()
    expect(thinking.locator("div")).to_have_text("Hm, yes.")
    expect(page.locator("article.assistant .body")).to_have_text("Hello!")
    expect(page.locator("article.assistant .facts")).to_contain_text("1,200 of the prompt cached")
    page.get_by_label("Message", exact=True).click()
    say(page, "And?")
    expect(answers(page)).to_have_text(["Hello!", "Hello!"])
    assert [message["content"] for message in asked[-1]["messages"]] == ["Hello", "Hello!", "And?"]

    calls += [{"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}}]
    calls += [{"index": 0, "function": {"arguments": part}} for part in ('{"place": ', '"Bern"}')]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    set_field(page, "tools", json.dumps(tools))
    say(page, "And in Bern?")
    call = page.locator("article.assistant .call")
    expect(call.locator("p")).to_have_text("Calls weather")
    expect(call.locator("dt, dd")).to_have_text(["place", "Bern"])
    answered(page)
    assert (asked[-1]["tools"], faults(page)) == (tools, [])
    calls.clear()
    say(page, "3 degrees")
    expect(answers(page).last).to_have_text("Hello!")
    called = {"id": "a", "type": "function"} | {"function": {"name": "weather", "arguments": '{"place": "Bern"}'}}
    assert asked[-1]["messages"][-2:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [called],
        },
        {"role": "tool", "tool_call_id": "a", "content": "3 degrees"},
    ]


@needs_chromium
@pytest.mark.long
def test_what_runs_where_and_what_left(page: Page, server: tuple[str, Any]) -> None:
    page.get_by_text("Where it runs").click()
    assert page.locator("#parts > *").all_inner_texts() == [
        *("head", "layers 0–1", "this device"),
        *("body", "layers 2–3", "a worker"),
        *("tail", "layers 4–5", "this device"),
    ]
    assert page.locator("#layers i").count() == 6
    before = traffic(server[0])
    page.get_by_label("Message", exact=True).focus()
    say(page, "Hello")
    answered(page)
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
@pytest.mark.long
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
    # What is kept for later prompts is not computed on.
    sessions = server[1]._sessions
    wait_until(lambda: len(sessions) == sessions.kept_sessions, PATIENCE / 1000)
    # It goes on with what there is.
    say(page, "Go on")
    answered(page)


@needs_chromium
@pytest.mark.long
def test_an_answer_is_stopped_before_it_begins(page: Page) -> None:
    """Nothing of it is left but a way to ask again."""
    page.route("**/v1/chat/completions", lambda _route: None)
    say(page, "Hello")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("article.assistant .facts")).to_have_text("stopped")
    expect(answers(page)).to_be_empty()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    answered(page)
    expect(answers(page)).not_to_be_empty()


OVERLAPS = """() => {
  const seen = (each) => {
    const [own, around] = [each, each.closest(".fields")].map((one) => one.getBoundingClientRect());
    return { left: own.left, right: own.right, top: Math.max(own.top, around.top),
      bottom: Math.min(own.bottom, around.bottom) };
  };
  const boxes = [...document.querySelectorAll("#settings label")].filter((each) => each.checkVisibility())
    .map(seen).filter((box) => box.top < box.bottom);
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
  return boxes.some((a, index) => boxes.slice(index + 1).some((b) => !apart(a, b)));
}"""


@needs_chromium
@pytest.mark.long
def test_settings_can_be_read_while_an_answer_comes(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    say(page, "Hello", 4000)
    expect(answers(page)).not_to_be_empty()
    page.locator("#settings summary").click()
    page.evaluate("document.querySelector('#picture-settings').hidden = false")
    assert not page.evaluate(OVERLAPS)
    box = page.locator("#settings").bounding_box()
    assert box is not None
    assert box["width"] > 300
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("article.assistant .facts")).to_have_text("stopped")


@needs_chromium
@pytest.mark.long
def test_what_to_do_when_a_worker_has_gone_for_good(page: Page) -> None:
    """What came of the answer stays, and so does what was typed meanwhile."""
    error = {"message": "no worker serves tiny 2:4", "type": "server_error", "code": "NoWorker", "param": None}
    events = [{"choices": [{"delta": {"content": "Half of"}, "finish_reason": None}]}, {"error": error}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body), times=1
    )
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text(
        re.compile(
            r"^No worker answers. Start one with lambda-split worker, and try again. \(no worker serves tiny"
        )
    )
    expect(answers(page)).to_have_text("Half of")
    expect(page.locator("article.assistant .facts")).to_have_text("broken off")
    page.get_by_label("Message", exact=True).fill("the next question")
    page.get_by_role("button", name="Try again").click()
    answered(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_have_value("the next question")


def test_errors_are_said_in_words_of_the_page() -> None:
    """By their names, which the server sends as codes."""
    source = (Path(chat_page.__file__).parent / "static" / "js" / "api.js").read_text("utf-8")
    table = re.search(r"const WORDS = \{(.*?)\n\};", source, re.DOTALL)
    assert table is not None
    codes = re.findall(r"^  (\w+):", table[1], re.MULTILINE)
    assert len(codes) > 5
    assert [code for code in codes if not hasattr(errors, code)] == ["context_length_exceeded"]


@needs_chromium
@pytest.mark.long
def test_an_error_is_shown_with_a_way_to_try_again(page: Page) -> None:
    page.get_by_label("Message", exact=True).fill("x" * POSITIONS)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text(
        re.compile(r"^The conversation is too long for the model. Shorten .* request [\w-]+\)$")
    )
    page.get_by_role("button", name="New chat").click()
    page.context.set_offline(True)
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    answered(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(answers(page)).to_have_count(1)


@needs_chromium
@pytest.mark.long
def test_versions_of_messages_and_answers(page: Page, checkpoint: Path) -> None:
    unsplit = Unsplit(checkpoint)
    say(page, "Hello", 5)
    answered(page)
    begun = unsplit.say("user:Hello</s>assistant:", 5)
    wait_until_kept(page, "Hello", begun)
    page.get_by_role("button", name="Go on").click()
    wait_until_kept(page, "Hello", unsplit.say("user:Hello</s>assistant:", 10))
    # The last question is edited from the empty field by a key. The earlier version stays.
    page.get_by_label("Message", exact=True).press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_have_value("Hello")
    page.get_by_label("Edit the message").fill("Bye")
    page.keyboard.press("Enter")
    bye = unsplit.say("user:Bye</s>assistant:", 5)
    wait_until_kept(page, "Bye", bye)
    expect(page.locator("article.user").get_by_text("2 of 2")).to_be_visible()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("article.assistant").get_by_text("2 of 2")).to_be_visible()
    answered(page)
    wait_until_kept(page, "Bye", bye)
    expect(page.locator("article.assistant .facts")).to_contain_text("the same as before")
    page.locator("article.user").get_by_role("button", name="Earlier version").click()
    wait_until_kept(page, "Hello", unsplit.say("user:Hello</s>assistant:", 10))
    expect(page.locator("article.user .body")).to_have_text("Hello")


@needs_chromium
@pytest.mark.long
def test_messages_are_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "Hello")
    answered(page)
    texts = kept(page)
    for name, text in zip(("Copy the message", "Copy the answer"), texts, strict=True):
        page.get_by_role("button", name=name).click()
        expect(page.get_by_role("button", name=name)).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == text


@needs_chromium
@pytest.mark.long
def test_an_edit_is_given_up(page: Page) -> None:
    say(page, "Hello")
    answered(page)
    page.get_by_role("button", name="Edit the message").click()
    page.keyboard.press("Escape")
    expect(page.locator("article.user .body")).to_have_text("Hello")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


@needs_chromium
@pytest.mark.long
def test_settings_are_what_is_asked_for(page: Page, checkpoint: Path) -> None:
    expect(page.locator("#temperature")).to_have_attribute("placeholder", "0")
    unsplit = Unsplit(checkpoint)
    given = {
        "system": "Be brief",
        "top-p": "0.9",
        "seed": str(2**63 - 1),
        "max-tokens": "8",
        "stop-texts": "~~\\n\n```",
    }
    for name, value in given.items():
        set_field(page, name, value)
    with page.expect_request("**/completions") as asked:
        page.get_by_label("Message", exact=True).fill("Hello")
        page.keyboard.press("Enter")
    body = json.loads(asked.value.post_data or "")
    # What is not set is left to the server.
    assert "temperature" not in body
    assert (body["top_p"], body["seed"], body["max_tokens"]) == (0.9, 2**63 - 1, 8)
    assert body["stop"] == ["~~\n", "```"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief"}
    answered(page)
    prompt = len(unsplit.tokenizer("system:Be brief</s>user:Hello</s>assistant:")["input_ids"])
    expect(page.locator("#context")).to_have_text(f"context: {prompt + 8} of 4,096 tokens")
    page.reload()
    expect(page.locator("#seed")).to_have_value(given["seed"])
    # What cannot be sent is said in the page's words, and the message stays.
    set_field(page, "max-tokens", 0)
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("Most tokens: a whole number from 1, or nothing.")
    expect(page.get_by_label("Most tokens")).to_be_focused()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")


@needs_chromium
@pytest.mark.long
def test_conversations_are_kept_found_exported_and_read_in_again(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": 700})
    say(page, "Apples")
    answered(page)
    page.get_by_role("button", name="New chat").click()
    say(page, "Pears")
    answered(page)
    names = page.locator("#conversations li button:first-child")
    expect(names).to_have_text(["Pears", "Apples"])
    page.reload()
    expect(names).to_have_text(["Pears", "Apples"])
    expect(page.locator("article")).to_have_count(0)
    page.get_by_label("Search conversations").fill("APPLE")
    expect(names).to_have_text(["Apples"])
    names.click()
    expect(page.locator("article")).to_have_count(2)
    page.get_by_label("Search conversations").fill("")
    with page.expect_download() as exported:
        page.get_by_role("button", name="Export").click()
    exported.value.save_as(tmp_path / "chats.json")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete “Apples”").click()
    expect(names).to_have_text(["Pears"])
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Delete all").click()
    expect(page.get_by_text("None yet.")).to_be_visible()
    page.locator("#import-file").set_input_files(tmp_path / "chats.json")
    expect(names).to_have_text(["Pears", "Apples"])
    # What this page would not have written is refused.
    for file in ({}, conversation("x") | {"version": 2}, conversation(), forged()):
        read_in(page, file)
        expect(page.get_by_role("alert")).to_have_text("chats.json is not a file that this page has exported.")
        page.get_by_role("button", name="New chat").click()
    expect(names).to_have_text(["Pears", "Apples"])


def forged() -> dict[str, Any]:
    file = conversation("Hello", "")
    file["conversations"][0]["nodes"][1]["picture"] = {
        "source": "http://attacker.example/a.png",
        "size": "1x1",
        "seed": "1",
        "steps": "1",
    }
    return file


@needs_chromium
@pytest.mark.long
def test_nothing_is_kept_if_that_is_wanted(page: Page) -> None:
    page.set_viewport_size({"width": 1280, "height": 700})
    say(page, "Apples")
    answered(page)
    wait_until(lambda: kept(page) != [], PATIENCE / 1000)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Keep conversations in this browser").uncheck()
    wait_until(lambda: kept(page) == [], PATIENCE / 1000)
    page.get_by_label("Message", exact=True).focus()
    say(page, "Pears")
    answered(page)
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.get_by_label("Keep conversations in this browser")).not_to_be_checked()
    assert kept(page) == []
    assert page.evaluate("Object.keys(localStorage)") == ["lambda-split-keep"]


@needs_chromium
@pytest.mark.long
def test_themes_and_help(page: Page) -> None:
    page.set_viewport_size({"width": 1280, "height": 700})
    scheme = "getComputedStyle(document.documentElement).colorScheme"
    assert page.evaluate(scheme) == "light dark"
    page.get_by_label("Theme").select_option("Dark")
    assert page.evaluate(scheme) == "dark"
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert page.evaluate(scheme) == "dark"
    page.keyboard.type("/help")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Help")).to_contain_text("edits your last message")
    assert faults(page) == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    # The key that closes it stops no answer.
    page.route("**/v1/chat/completions", lambda _route: None)
    say(page, "Hello")
    page.get_by_role("button", name="Help").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("status")).to_have_text("Answering …")
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.")


@needs_chromium
@pytest.mark.long
def test_a_wrong_key(browser: Browser, server: tuple[str, Any]) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(server[0])
        expect(page.get_by_label("asks for its API key")).to_be_focused()
        # It does not speak as if one could ask already.
        expect(page.get_by_text("Ask something.")).to_be_hidden()
        expect(page.get_by_label("Message", exact=True)).to_be_hidden()
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server refused this key.")
        expect(page.get_by_label("asks for its API key")).to_be_focused()
        assert page.evaluate("localStorage.length") == 0


@needs_chromium
@pytest.mark.long
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        pytest.param(1280, "light", marks=pytest.mark.long),
        pytest.param(390, "dark", marks=pytest.mark.long),
        (320, "light"),
    ],
)
def test_everybody_can_read_it(browser: Browser, server: tuple[str, Any], scheme: Any, width: int) -> None:
    with opened(
        browser, server[0], color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce"
    ) as page:
        assert fits(page)
        assert faults(page) == []
        unlock(page)
        tops = page.locator("header button:visible").evaluate_all(
            "(all) => all.map((one) => one.getBoundingClientRect().top)"
        )
        assert len(set(tops)) == 1
        # All of a model's name is seen, however narrow the page is.
        name = page.locator("#model")
        name.evaluate("(name) => (name.textContent = 'smollm2-135m-instruct, stable-diffusion-xl-base-1.0')")
        assert name.evaluate("(name) => name.scrollWidth <= name.clientWidth")
        assert {"log", "prompt", "send", "reset", "open-help", "search" if width > 1000 else "menu"} <= reached(
            page
        )
        read_in(page, conversation("Hello", RICH))
        menu = page.get_by_role("button", name="Chats")
        if menu.is_visible():
            menu.click()
            expect(page.get_by_label("Search conversations")).to_be_focused()
            page.keyboard.press("Escape")
            expect(menu).to_be_focused()
            menu.click()
        page.get_by_role("navigation").get_by_role("button", name="Hello", exact=True).click()
        expect(answers(page).locator("math")).to_have_count(1)
        page.get_by_text("Settings").click()
        assert fits(page)
        assert faults(page) == []
        ground = page.locator("body").evaluate("(body) => getComputedStyle(body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 300) == (scheme == "dark")


def test_the_page_is_public_and_strict(server: tuple[str, Any]) -> None:
    for path in ("", "chat.css", "js/main.js", "vendor/marked.js", "vendor/marked.LICENSE"):
        answer = httpx2.get(f"{server[0]}{path}")
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
    # Nothing of a request has to be understood.
    assert httpx2.get(server[0], headers={"Range": "bytes=5-2"}).status_code == 200
    assert httpx2.get(f"{server[0]}split").status_code == 401


def test_the_page_is_small_and_has_the_licences_of_others() -> None:
    files = Path(chat_page.__file__).parent / "static"
    loaded = [path for path in files.rglob("*") if path.suffix in (".js", ".css")]
    assert sum(path.stat().st_size for path in loaded) <= 400_000
    for script in (files / "vendor").glob("*.js"):
        assert "icense" in script.with_suffix(".LICENSE").read_text("utf-8")
        assert f"`{script.name}`" in (files / "vendor" / "README.md").read_text("utf-8")
