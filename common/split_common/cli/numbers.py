"""Numbers on the command line: finite, and small enough for the libraries that get them."""

from __future__ import annotations

import math
from typing import Any

import typer

#: Least and largest integer of an option: what 64 bits hold, signed or not. Seeds may be as large.
INTEGERS = -(2**63), 2**64 - 1

#: Longest time in an option, in seconds: three years. The system's clocks and sockets take no timeout of centuries.
MAX_SECONDS = 1e8


def bound_numbers(command: Any) -> None:
    """Makes a command, and all commands in its groups, refuse numbers that are not finite, or out of all bounds.

    It looks at values, so it holds for every option, whatever its type or parser.
    """
    for inner in getattr(command, "commands", {}).values():
        bound_numbers(inner)
    for parameter in command.params:
        parameter.callback = _bounded(parameter.callback)


def _bounded(callback: Any) -> Any:
    """A parameter's callback that first refuses numbers out of bounds."""

    def check(context: Any, parameter: Any, value: Any) -> Any:
        if isinstance(value, int | float) and (reason := _reason(value, parameter.metavar == "SECONDS")):
            raise typer.BadParameter(reason, ctx=context, param=parameter)
        return callback(context, parameter, value) if callback is not None else value

    return check


def _reason(value: float, seconds: bool) -> str | None:
    """Why a number is refused; None if it is not."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number."
    if isinstance(value, int) and not INTEGERS[0] <= value <= INTEGERS[1]:
        return f"{value} is out of range: it takes more than 64 bits."
    if seconds and value > MAX_SECONDS:
        return f"{value:g} is too long: at most {MAX_SECONDS:g} seconds."
    return None
