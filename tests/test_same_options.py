"""One way to say a thing: an option is the same in every command that has it, and help is in one form."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from split_common.cli import application, main
from split_common.cli.presentation import HEADINGS, present
from test_docs import ROOT

#: Options that differ on purpose, by the command in which they do; and why.
DIFFERENT = {
    ("stress", "--broker"): "it starts a queue of its own unless one is named",
    ("stress", "--model"): "it makes a small model of its own unless one is named",
    ("stress", "--seed"): "it has one always, so that a run can be repeated",
    ("stress", "--workers"): "it starts as many, and may start none",
    ("demo", "--workers"): "it starts as many",
    ("demo", "--max-tokens"): "its answers are short",
    ("demo", "--image"): "it makes its own pictures",
    ("doctor", "--model"): "it looks at a model only if one is named",
    ("image", "--image-model"): "no other model is meant, so it may be called --model",
    ("image", "--codec"): "texts have other codecs",
    ("worker", "--device"): "a body may be laid over several GPUs",
    ("worker", "--kv-memory"): "a worker takes what is free, a device a little",
    ("worker", "--prefix-cache"): "a worker keeps what sessions leave free, a device a little",
    ("doctor", "--adapter"): "it looks at an adapter only if one is named",
    ("doctor", "--speculate"): "it looks at a draft model only if one is named",
    ("submit", "--speculate"): "it asks for one job; an agent has a default for all",
    ("redis-acl", "--format"): "it prints rules, not answers",
    ("keys add-worker", "--model"): "a model of the fleet, by its name there",
    ("keys add-worker", "--layers"): "what a certificate allows, in numbers that mean the same for any model",
    **{
        (f"keys {command}", "--keys"): "the keys of one machine alone are not managed"
        for command in ("init", "add-device", "add-worker", "add-model", "revoke")
    },
}

#: Options that say what is written, which is another thing in each command.
OUTPUTS = {"--output", "--output-dir"}


def walk(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The commands that users see, by the words that call them."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, each in inner.items():
        if not each.hidden:
            yield from walk(each, f"{path} {name}".strip())


@pytest.fixture(scope="module")
def root() -> Any:
    application.load_commands()
    return present(typer.main.get_command(application.app))


@pytest.fixture(scope="module")
def options(root: Any) -> list[tuple[str, Any]]:
    """Each option of each command."""
    return [
        (path, parameter)
        for path, command in walk(root)
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.hidden
    ]


def shape(option: Any) -> tuple[Any, ...]:
    """All that users see of an option."""
    default = option.show_default if isinstance(option.show_default, str) else option.default
    names = (*option.opts, *option.secondary_opts)
    return names, option.metavar, option.help, default, option.envvar, option.min, option.max, option.multiple


def test_an_option_is_the_same_in_every_command(options: list[tuple[str, Any]]) -> None:
    found: dict[str, dict[tuple[Any, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for path, option in options:
        if (path, option.opts[0]) not in DIFFERENT and option.opts[0] not in OUTPUTS:
            found[option.opts[0]][shape(option)].append(path)
    different = {name: dict(shapes) for name, shapes in found.items() if len(shapes) > 1}
    assert not different


def test_what_differs_on_purpose_does_differ(options: list[tuple[str, Any]]) -> None:
    same = {option.opts[0]: shape(option) for path, option in options if (path, option.opts[0]) not in DIFFERENT}
    differing = {(path, option.opts[0]) for path, option in options if shape(option) != same.get(option.opts[0])}
    assert differing >= DIFFERENT.keys()


def test_a_thing_has_one_name(options: list[tuple[str, Any]]) -> None:
    names: dict[str, set[str]] = defaultdict(set)
    for _, option in options:
        names[option.help].add(option.opts[0])
        if option.envvar:
            names[f"${option.envvar}"].add(option.opts[0])
    assert not {thing: found for thing, found in names.items() if len(found) > 1}


def test_every_option_says_what_it_is(root: Any) -> None:
    for path, command in walk(root):
        for parameter in command.params:
            if not parameter.hidden:
                assert re.fullmatch(r"[A-Z`$].*\.", parameter.help or "", re.DOTALL), (path, parameter.opts)
                assert "Default:" not in parameter.help, (path, parameter.opts)


def test_help_has_one_form(root: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for path, _ in walk(root):
        assert main([*path.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert "--help" in shown
        # Flags and arguments have no type, choices no brackets, and numbers are as one would type them.
        assert not re.search(r"<(?!=)", shown), path
        assert not re.search(r"\[[^]]*(?<![\d.])\d+\.0(?![\d.])", shown), path
        assert "[default: (" not in shown, path
        usage = next(line for line in shown.splitlines() if "Usage:" in line)
        assert not re.search(r"[{}]|\[\[", usage), path
    assert main(["worker", "--help"]) == 0
    shown = capsys.readouterr().out
    for default in ("2:-2", "30", "10", "auto", "one per core"):
        assert f"[default: {default}]" in shown


def test_commands_are_grouped_as_in_readme(root: Any, capsys: pytest.CaptureFixture[str]) -> None:
    listed = re.findall(
        r"^\| (?:\*\*(.+)\*\*|`lambda-split ([a-z-]+).*?`) +\|", (ROOT / "README.md").read_text(), re.M
    )
    table = {heading: tuple(names) for heading, *names in _sections(listed)}
    assert table == HEADINGS
    assert [name for names in HEADINGS.values() for name in names] == list(dict(_visible(root)))
    main(["--help"])
    shown = re.findall(r"^╭─ (.+?) ─|^│ ([a-z-]+) ", capsys.readouterr().out, re.M)
    assert {heading: tuple(names) for heading, *names in _sections(shown[1:])} == HEADINGS


def _visible(root: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name, command) for name, command in root.commands.items() if not command.hidden)


def _sections(pairs: list[tuple[str, str]]) -> Iterator[list[str]]:
    """Lists of a heading and the names after it, of pairs that hold one or the other."""
    section: list[str] = []
    for heading, name in pairs:
        if heading:
            if section:
                yield section
            section = [heading]
        elif section:
            section.append(name)
    yield section
