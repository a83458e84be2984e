"""How help looks: commands in groups, flags without a type, defaults in one form."""

from __future__ import annotations

from typing import Any

from split_common.compat.typer import show_default_as_typed

#: The commands by the headings of `lambda-split --help`, in its order and in that of README's table.
HEADINGS = {
    "Try it": ("demo",),
    "Run a fleet": ("broker", "worker"),
    "Ask": ("generate", "chat", "image", "serve"),
    "Ask for many, in the background": ("batch", "submit", "jobs", "agent"),
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
    parameters = command.get_params

    def with_plain_flags(context: Any) -> list[Any]:
        # Among them --help, which is made when it is needed.
        found: list[Any] = parameters(context)
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.display_type_rich = _no_type
        return found

    command.get_params = with_plain_flags


def _no_type(ctx: Any) -> None:
    """A flag takes no value."""
