"""`-` and `./-` on the command line: the first is stdin or stdout, the second a file of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tell_dashes_apart(command: Any) -> None:
    """Makes a command, and all commands in its groups, take `./-` as a file: as a `Path`, it equals `-`."""
    for inner in getattr(command, "commands", {}).values():
        tell_dashes_apart(inner)
    for parameter in command.params:
        if parameter.type_descriptor.is_path:
            parameter.consume_value = _with_whole_paths(parameter.consume_value)


def _with_whole_paths(consume: Any) -> Any:
    """A parameter's values as they were typed, but files that are called `-` with their whole paths."""

    def consumed(context: Any, options: Any) -> Any:
        value, source = consume(context, options)
        if isinstance(value, list | tuple):
            return type(value)(map(_whole, value)), source
        return _whole(value), source

    return consumed


def _whole(value: Any) -> Any:
    if isinstance(value, str) and value != "-" and str(Path(value)) == "-":
        return str(Path.cwd() / value)
    return value
