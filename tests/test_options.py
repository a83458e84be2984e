"""Every command's options are those of a list: names, what they take, defaults and environment variables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from split_common.cli import application

#: One line for each argument and option of each command. A line that changes is a change that users see.
GOLDEN = Path(__file__).parent / "golden" / "options.txt"


def commands(command: Any, path: str = "lambda-split") -> Iterator[tuple[str, Any]]:
    """All commands and groups, by the words that call them."""
    yield path, command
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from commands(inner, f"{path} {name}")


def line(parameter: Any) -> str:
    """What users can write for a parameter, and what it is if they do not."""
    words = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        words = []
    if not getattr(parameter, "is_flag", False):
        choices = parameter.type_descriptor.choices
        words.append("|".join(choices) if choices else parameter.metavar or parameter.name.upper())
    if parameter.min is not None or parameter.max is not None:
        words.append("..".join("" if bound is None else f"{bound:g}" for bound in (parameter.min, parameter.max)))
    if parameter.multiple:
        words.append("repeated")
    if parameter.required:
        words.append("required")
    elif parameter.default is not None and parameter.default is not False:
        shown = parameter.show_default
        words.append(f"= {shown if isinstance(shown, str) else parameter.default}")
    if parameter.envvar:
        words.append(f"${parameter.envvar}")
    if parameter.hidden:
        words.append("hidden")
    return " ".join(words)


def test_options_stay() -> None:
    application.load_commands()
    lines = [
        f"{path}: {line(parameter)}"
        for path, command in commands(typer.main.get_command(application.app))
        for parameter in sorted(command.params, key=line)
    ]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()
