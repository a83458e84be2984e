"""How help looks: commands in groups; types, bounds and defaults in one form."""

from __future__ import annotations

import functools
from typing import Any

from split_common.compat.typer import show_default_as_typed, show_range_as_typed, show_required_plainly

#: The commands by the headings of `lambda-split --help`, in its order and in that of README's table.
HEADINGS = {
    "Try it": ("demo",),
    "Run a fleet": ("broker", "worker"),
    "Ask": ("generate", "chat", "image", "serve"),
    "Ask for many": ("batch", "submit", "jobs", "agent"),
    "Look and check": ("inspect", "doctor", "ping", "dead-letters", "stress"),
    "Keys": ("keys", "redis-acl"),
}


def present(application: Any) -> Any:
    """Arranges the commands under `HEADINGS`, others after them, and tidies the help of all; returns the same."""
    order = {name: heading for heading, names in HEADINGS.items() for name in names}
    known = {name: application.commands[name] for name in order if name in application.commands}
    for name, command in known.items():
        command.rich_help_panel = order[name]
    application.commands = known | application.commands
    _tidy(application)
    return application


def _tidy(command: Any) -> None:
    for inner in getattr(command, "commands", {}).values():
        _tidy(inner)
    for parameter in command.params:
        show_default_as_typed(parameter)
        show_range_as_typed(parameter)
        if parameter.param_type_name == "argument":
            show_required_plainly(parameter)
    parameters = command.get_params

    def with_plain_types(context: Any) -> list[Any]:
        # Among them --help, which is made when it is needed.
        found: list[Any] = parameters(context)
        for parameter in found:
            _show_type_plainly(parameter)
        return found

    command.get_params = with_plain_types


def _show_type_plainly(parameter: Any) -> None:
    """Choices are shown without the brackets around them, and flags and arguments without a type."""
    if getattr(parameter, "is_flag", False) or parameter.param_type_name == "argument":
        parameter.display_type_rich = _no_type
        return
    if parameter.type_descriptor.choices and parameter.metavar is None:
        parameter.display_type_rich = functools.partial(_choices, parameter)


def _choices(parameter: Any, ctx: Any) -> str:
    return "|".join(map(str, parameter.type_descriptor.choices))


def _no_type(ctx: Any) -> None:
    """A flag takes no value, and the name of an argument says what it is."""
