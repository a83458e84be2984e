"""Paths on the command line: `-` is stdin or stdout, `./-` a file of that name, and an empty text is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def tell_dashes_apart(command: Any) -> None:
    """Makes a command, and all commands in its groups, take `./-` as a file: as a `Path`, it equals `-`.

    An empty text, which as a `Path` is the current directory, is refused.
    """
    for inner in getattr(command, "commands", {}).values():
        tell_dashes_apart(inner)
    for parameter in command.params:
        if parameter.type_descriptor.is_path:
            parameter.consume_value = _with_whole_paths(parameter)


def _with_whole_paths(parameter: Any) -> Any:
    """A parameter's values as they were typed, but files that are called `-` with their whole paths."""
    consume = parameter.consume_value

    def consumed(context: Any, options: Any) -> Any:
        value, source = consume(context, options)
        if "" in (value if isinstance(value, list | tuple) else (value,)):
            raise typer.BadParameter("the path is empty", ctx=context, param=parameter)
        if isinstance(value, list | tuple):
            return type(value)(map(_whole, value)), source
        return _whole(value), source

    return consumed


def _whole(value: Any) -> Any:
    if isinstance(value, str) and value != "-" and str(Path(value)) == "-":
        return str(Path.cwd() / value)
    return value
