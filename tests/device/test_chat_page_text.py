"""What a model writes, as the chat page shows it, in a real browser. All of it may be hostile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from chat_page import chromium, files_alone, needs_chromium, opened

pytestmark = needs_chromium

#: Draws a text that comes in pieces; calls `each` after each of them. Returns the HTML it became.
DRAW = """async (pieces) => {
  const { Rendering } = await import("./js/markdown.js");
  document.querySelector("#drawn")?.remove();
  const article = document.createElement("article");
  const body = document.createElement("div");
  article.className = "assistant";
  article.id = "drawn";
  body.className = "body";
  article.append(body);
  document.querySelector("#log").append(article);
  const rendering = new Rendering(body);
  const stages = [];
  for (let count = 1; count <= pieces.length; count += 1) {
    await new Promise((drawn) => rendering.update(pieces.slice(0, count).join(""), drawn));
    stages.push(body.innerHTML);
  }
  rendering.finish(pieces.join(""));
  return [...stages, body.innerHTML];
}"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with files_alone() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address, viewport={"width": 320, "height": 640}) as page:
        yield page


def drawn(page: Page, *pieces: str) -> list[str]:
    """The HTML after each of the pieces in which a text comes, and in the end."""
    stages: list[str] = page.evaluate(DRAW, list(pieces))
    return stages


def test_markdown(page: Page) -> None:
    text = (
        "# Title\n\n**b** *i* ~~d~~ `c`<br>[l](https://example.org)\n\n- [x] one\n- two\n\n|a|b|\n|-|-:|\n|1|2|\n"
    )
    text += "\n3. three\n4. four\n"
    drawn(page, text)
    assert page.locator("#drawn h3").inner_text() == "Title"
    assert page.locator("#drawn p > *").evaluate_all("(all) => all.map(({localName}) => localName)") == [
        *("strong", "em", "del", "code", "br", "a")
    ]
    link = page.locator("#drawn a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert link.get_attribute("target") == "_blank"
    assert page.locator("#drawn ul li").all_inner_texts() == ["☑ one", "two"]
    assert page.locator("#drawn td").all_inner_texts() == ["1", "2"]
    aligned = "(all) => all.map((one) => getComputedStyle(one).textAlign)"
    assert page.locator("#drawn td").evaluate_all(aligned) == ["start", "right"]
    assert page.locator("#drawn ol").evaluate("(list) => list.start") == 3


def test_code_can_be_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    drawn(page, "```python\nprint('<b>')\n```")
    assert page.locator("#drawn .code-head span").inner_text() == "python"
    page.get_by_role("button", name="Copy this code").click()
    expect(page.get_by_role("button", name="Copy this code")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print('<b>')"


def test_formulas(page: Page) -> None:
    written = (
        r"$e^{i\pi}$, \(a_1\), $5 and $6",
        r"$$\frac12 \color{red}{x}$$",
        r"\[ \cancel{y} \]",
        "$\\nonsense{$",
    )
    drawn(page, "\n\n".join(written))
    formulas = page.locator("#drawn math")
    assert formulas.evaluate_all("(all) => all.map((one) => one.getAttribute('aria-label'))") == [
        *(r"e^{i\pi}", "a_1", r"\frac12 \color{red}{x}", r"\cancel{y}")
    ]
    assert page.locator("#drawn").inner_text().count("$5 and $6") == 1
    # What is not TeX stays as it was written. Colours need styles, which the page's policy forbids in markup.
    assert "nonsense" in page.locator("#drawn").inner_text()
    assert "rgb(255, 0, 0)" in formulas.locator("mi").evaluate_all(
        "(all) => all.map((one) => getComputedStyle(one).color)"
    )


def test_writing_from_right_to_left(page: Page) -> None:
    tables = ["| اسم | b |\n|-|-|\n| واحد | two |", "| a | b |\n|-|-|\n| واحد | two |"]
    drawn(page, "\n\n".join(["Hello", "مرحبا بالعالم", "- שלום", *tables]))
    directions = "(all) => all.map((one) => getComputedStyle(one).direction)"
    assert page.locator("#drawn p, #drawn ul").evaluate_all(directions) == ["ltr", "rtl", "rtl"]
    # A table begins on the side of its first word, and each cell on that of its own.
    assert page.locator("#drawn table").evaluate_all(directions) == ["rtl", "ltr"]
    lefts = "(all) => all.map((one) => one.getBoundingClientRect().left)"
    first, second, *_ = page.locator("#drawn th").evaluate_all(lefts)
    assert first > second
    own = "(all) => all.map((one) => getComputedStyle(one).unicodeBidi)"
    assert set(page.locator("#drawn td").evaluate_all(own)) == {"plaintext"}


def test_an_answer_that_is_still_coming(page: Page) -> None:
    stages = drawn(
        page, "Look:\n\n``", "`py\nx = 1", "\ny = **2**\n", "```\n\nEnd $x", "$ of [it][1].\n\n", "[1]: https://a.b"
    )
    assert ["<pre" in stage for stage in stages] == [False, True, True, True, True, True, True]
    assert "y = **2**" in stages[2]
    assert ["<math" in stage for stage in stages] == [False, False, False, False, True, True, True]
    # An address may come after its link.
    assert 'href="https://a.b"' in stages[-1]


#: What the model is sent, of a conversation in which a picture, and an answer that failed, came before.
CONTEXT = """async () => {
  const { add, context, newConversation } = await import("./js/thread.js");
  const conversation = newConversation();
  for (const [role, text, asks] of [
    ["user", "a", "text"], ["assistant", "b", "text"], ["user", "/image c", "picture"],
    ["assistant", "", "picture"], ["user", "d", "text"], ["assistant", "", "text"], ["user", "e", "text"],
  ]) add(conversation, conversation.leaf, { role, text, asks });
  return context(conversation, conversation.leaf).map(({ role, content }) => `${role}: ${content}`);
}"""


def test_the_model_is_sent_texts_that_were_answered(page: Page) -> None:
    assert page.evaluate(CONTEXT) == ["user: a", "assistant: b", "user: e"]


#: Reads a stream of events, given as text. Returns the events, and what was noticed meanwhile.
EVENTS = """async (text) => {
  const { events } = await import("./js/api.js");
  const [found, noticed] = [[], []];
  for await (const event of events(new Response(text), (notice) => noticed.push(notice))) found.push(event);
  return [found, noticed];
}"""


def test_comments_of_a_stream_are_noticed(page: Page) -> None:
    text = ': the worker is gone\n\ndata: {"n": 1}\n\n: another one\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'
    assert page.evaluate(EVENTS, text) == [[{"n": 1}, {"n": 2}], ["the worker is gone", "another one"]]


#: What could run, load, or cover something, if it were believed.
HOSTILE = [
    "<script>window.harm = 1</script>",
    "<img src=x onerror='window.harm = 1'>",
    "<svg onload='window.harm = 1'><script>window.harm = 1</script></svg>",
    "<math><mtext><style><img src=x onerror='window.harm = 1'></style></mtext></math>",
    "<math><mi xlink:href='javascript:window.harm = 1'>x</mi></math>",
    "<style>* { display: none }</style><p style='position: fixed; inset: 0'>x</p>",
    "<iframe srcdoc='<script>parent.harm = 1</script>'></iframe><base href='http://attacker.example/'>",
    "<form action='http://attacker.example/'><input name=q autofocus onfocus='window.harm = 1'></form>",
    "[x](javascript:window.harm=1) [y](JaVaScRiPt:window.harm=1) [z](data:text/html,<script>harm=1</script>)",
    "[x](&#106;avascript:window.harm=1) <javascript:window.harm=1> [v](vbscript:x) [f](file:///etc/passwd)",
    "![x](http://attacker.example/a.png) ![y](data:image/svg+xml,<svg/onload=alert(1)>)",
    '![x" onerror="window.harm=1](y) [a](http://b.example/"onmouseover="window.harm=1)',
    '```"><img src=x onerror=window.harm=1>\n<img src=x onerror=window.harm=1>\n```',
    r"$\href{javascript:window.harm=1}{x}$ $\includegraphics{http://attacker.example/a.png}$",
    r"$\text{<img src=x onerror=window.harm=1>}$ $\style{position:fixed}{x}$ $\class{formula}{x}$",
    r'$\text{ style="position:fixed" onload="window.harm=1"}$ $\data{x=1}{y}$ $\id{log}{y}$',
    r"$\def\a{\a\a}\a$ $\rule{9999em}{9999em}$",
    '<div class="formula">x</div><span class="formula" id="log" name="harm">y</span>',
    "| <img src=x onerror=window.harm=1> |\n|-|\n| [x](javascript:window.harm=1) |",
]

#: What may be in the page of what a model writes: elements, and their attributes.
HARMLESS = """(drawn) => [...drawn.querySelectorAll("*")].flatMap((element) => {
  const wrong = [...element.attributes].filter(({ name, value }) => /^on|^srcdoc$|^src$|^action$|^id$/.test(name)
    || (name === "href" && !/^(https?|mailto):/.test(value)) || (name === "style" && /position|url/.test(value)));
  const tag = /^(script|style|img|iframe|form|input|base|svg|object|embed|link|meta)$/.test(element.localName);
  return tag || wrong.length ? [element.outerHTML] : [];
})"""


def test_what_is_hostile_is_shown_and_does_nothing(page: Page) -> None:
    page.evaluate("window.harm = 0")
    for text in HOSTILE:
        drawn(page, text)
        assert page.locator("#drawn .body").evaluate(HARMLESS) == [], text
        half = len(text) // 2
        drawn(page, text[:half], text[half:])
        assert page.locator("#drawn .body").evaluate(HARMLESS) == [], text
    drawn(page, *HOSTILE)
    assert page.evaluate("window.harm") == 0
    # What is written as HTML is shown as text.
    drawn(page, HOSTILE[0])
    assert page.locator("#drawn").inner_text().strip() == HOSTILE[0]
    # Nothing is painted over the rest of the page.
    assert page.locator("#drawn .body").evaluate("(body) => getComputedStyle(body).contain") == "paint"


#: Counts how many characters are parsed while a text of paragraphs comes in pieces, for each of its own.
WORK = """async (size) => {
  const { Rendering } = await import("./js/markdown.js");
  const { Lexer } = await import("./vendor/marked.js");
  const { blockTokens } = Lexer.prototype;
  let work = 0;
  Lexer.prototype.blockTokens = function (source, ...rest) {
    work += source.length;
    return blockTokens.call(this, source, ...rest);
  };
  const body = document.createElement("div");
  const rendering = new Rendering(body);
  const paragraph = "Some words of an answer. ".repeat(8) + "\\n\\n";
  let text = "";
  while (text.length < size) {
    text += paragraph;
    await new Promise((drawn) => rendering.update(text, drawn));
  }
  Lexer.prototype.blockTokens = blockTokens;
  return work / text.length;
}"""


def test_work_grows_with_the_answer_and_not_with_its_square(page: Page) -> None:
    small, large = page.evaluate(WORK, 2000), page.evaluate(WORK, 20_000)
    assert large < 1.5 * small


@pytest.mark.long
@pytest.mark.parametrize("text", ["a " * 200_000, "> " * 20_000, "```\n" + "x\n" * 100_000, "*a _b " * 50_000])
def test_huge_answers(page: Page, text: str) -> None:
    drawn(page, text)
    assert len(page.locator("#drawn").inner_text()) > len(text) // 3
