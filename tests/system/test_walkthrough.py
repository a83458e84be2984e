"""README and the tutorial do what they say: every block of them is run, and what it prints is compared."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from test_docs import ROOT
from walkthrough import Block, Walk, blocks, difference

#: The pages whose blocks are run.
PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]

#: Languages of blocks that can be run, and of those that only show something.
RUN = {"console", "bash", "python"}
SHOWN = {"text", "mermaid"}


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_does_what_the_page_shows(page: Path, smollm2: Path) -> None:
    # A short path: the sockets of the runtime directory lie below it.
    with tempfile.TemporaryDirectory(prefix="walk-") as home, Walk(Path(home), smollm2, ROOT) as walk:
        for block in blocks(page):
            if block.language in RUN and block.reason is None:
                walk.run(block)
        walk.stop()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in (SHOWN if block.reason is None else RUN) or block.reason is None
        assert block.language in RUN | SHOWN, f"{block}: a block of the language {block.language!r} is not run"
        if block.language == "console":
            assert list(block.commands()), f"{block}: no command"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_agent_that_a_page_starts_is_stopped_on_it(page: Path) -> None:
    consoles = [block for block in blocks(page) if block.language == "console"]
    commands = [command.text for block in consoles for command in block.commands()]
    started, stopped = (
        [index for index, command in enumerate(commands) if command.startswith(f"lambda-split agent {verb}")]
        for verb in ("start", "stop")
    )
    assert started
    assert len(started) == len(stopped)
    assert all(start < stop for start, stop in zip(started, stopped, strict=True))


def test_blocks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n\n```text\n1\n```\n\nText.\n\n```text\na drawing\n```\n\n"
        "<!-- not run: needs Docker -->\n```bash\ndocker ps\n```\n"
    )
    assert blocks(page) == [
        Block(page, 1, "python", "print(1)\n", None, "1\n"),
        Block(page, 11, "text", "a drawing\n", None),
        Block(page, 16, "bash", "docker ps\n", "needs Docker"),
    ]


def test_commands_of_a_console() -> None:
    code = "$ one \\\n  two\nout\n$ lambda-split chat\n> Hello\nHi\n^C\nbye\n"
    one, chat = Block(Path("page.md"), 1, "console", code, None).commands()
    assert (one.text, one.shown, one.shown_after_interrupt) == ("one   two", ["out"], None)
    assert (chat.typed, chat.shown, chat.shown_after_interrupt) == (["Hello"], ["Hi"], ["bye"])
    with pytest.raises(ValueError, match="begins with a command"):
        list(Block(Path("page.md"), 1, "console", "out\n", None).commands())


def test_what_differs_from_a_page() -> None:
    assert difference(["a", "b"], ["a"], ["progress", "b"]) is None
    assert difference(["b", "a"], ["a"], ["b"]) is None
    assert difference(["a"], ["a", "b"], []) == "not shown: b"
    assert difference(["b"], ["a", "b"], []) == "not printed: b"
    assert difference(["a", "c"], ["a"], ["b"]) == "not printed: c"
    assert difference(["b", "a"], ["a", "b"], []) is not None
    assert difference(["…", "c"], ["a", "b", "c"], []) is None
    assert difference(["a", "…"], ["a", "b", "c"], []) is None
    assert difference(["a", "…"], ["b"], []) == "not printed: a"


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("job-25c2b4e0f484", "job-0123456789ab"),
        ("60 answers in 8.2 s, 15.5 tokens/s", "60 answers in 71 s, 1,015.5 tokens/s"),
        ("keys and values for 107,536 tokens, or 52 sessions", "keys and values for 9,536 tokens, or 4 sessions"),
        ("│ a │  1 │", "│ a │ 1 │"),
    ],
)
def test_what_may_differ(shown: str, printed: str) -> None:
    assert difference([shown], [printed], []) is None
    assert difference([shown], [printed.replace("a", "b", 1) + "."], []) is not None
