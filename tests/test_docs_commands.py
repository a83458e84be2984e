"""Every command in the docs exists, with the options that it is given there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from split_common.cli import application
from test_docs import FENCE, INLINE, ROOT, pages

#: Stands for the bar in `start|stop`, which is none of the shell's.
ALTERNATIVE = "¦"

#: What stands for "and so on" in a command.
ELLIPSIS = "…"


def command_lines(text: str) -> Iterator[str]:
    """The lines of a page that call lambda-split, without what the shell adds."""
    for block in FENCE.finditer(text):
        if block["language"] in ("", "bash", "console", "text"):
            lines = block["code"].replace("\\\n", " ").splitlines()
            yield from (line.removeprefix("$ ") for line in lines if re.search(r"(^|[\s(])lambda-split\s", line))
    for inline in INLINE.findall(FENCE.sub("", text)):
        if inline.startswith("lambda-split "):
            yield inline


def words(line: str) -> list[str]:
    """The words of a command line from `lambda-split` on, without it; none if the line only mentions it."""
    line = re.sub(r"<([A-Z]+)>", r"\1", line)
    line = re.sub(r"(?<=\w)\\?\|(?=\w)", ALTERNATIVE, line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    try:
        split = list(lexer)
    except ValueError:  # a quotation mark of a sentence
        return []
    for start, word in enumerate(split):
        before = split[start - 1] if start else ";"
        if word == "lambda-split" and ("=" in before or not before.strip("();<>|&")):
            end = next((i for i in range(start, len(split)) if not split[i].strip("();<>|&")), len(split))
            return split[start + 1 : end]
    return []


def fault(line: Sequence[str]) -> str | None:
    """What is wrong with a command line; None if it can be called. Values of options are not looked at."""
    command: Any = typer.main.get_command(application.app)
    rest = list(line)
    path = "lambda-split"
    while rest and (inner := getattr(command, "commands", None)) is not None and not rest[0].startswith("-"):
        # Several subcommands of which one is to be chosen.
        names = rest.pop(0).split(ALTERNATIVE)
        if unknown := [name for name in names if name not in inner]:
            return f"{path} has no command {unknown[0]}" if unknown[0] != ELLIPSIS else None
        path, command = f"{path} {names[0]}", inner[names[0]]
    if getattr(command, "commands", None) is not None or rest == ["--help"]:
        return None
    known = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    for word in rest:
        if word.startswith("-") and word != "-":
            option = known.get(word.partition("=")[0])
            if option is None or option.hidden:
                return f"{path} has no option {word}"
    return None


@pytest.fixture(scope="module", autouse=True)
def _commands() -> None:
    application.load_commands()


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_docs_can_be_called(page: Path) -> None:
    faults = [fault(words(line)) for line in command_lines(page.read_text())]
    assert list(filter(None, faults)) == []


def test_commands_are_found() -> None:
    text = (
        "`lambda-split worker --teleport`\n\n```console\n$ A=1 lambda-split jobs teleport | cat\n```\n\n"
        '```\n(echo "user"; A=2 lambda-split generate \\\n  --beam-me-up "x")\n```\n'
    )
    assert [fault(words(line)) for line in command_lines(text)] == [
        "lambda-split jobs has no command teleport",
        "lambda-split generate has no option --beam-me-up",
        "lambda-split worker has no option --teleport",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "lambda-split agent start|stop",
        r"lambda-split agent start\|stop",
        "lambda-split keys …",
        "lambda-split chat --model=<MODEL> | tee log",
        "A=1 lambda-split generate - < prompt.txt",
        "lambda-split --help",
        "lambda-split jobs list --json",
    ],
)
def test_commands_that_are_right(line: str) -> None:
    assert fault(words(line)) is None
    assert words(line)
