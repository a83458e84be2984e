"""What is private in typer. Written against 0.29."""

from __future__ import annotations

import re
from typing import Any


def show_default_as_typed(parameter: Any) -> None:
    """Makes help show an option's or argument's default as one would type it: `60` for 60.0, a text as it is.

    Written against typer 0.29. If it breaks, look at `_get_default_string` in `core.py`.
    """
    shown = parameter._get_default_string

    def as_typed(*, default_value: Any, show_default_is_str: bool, **more: Any) -> str:
        if show_default_is_str:
            return str(parameter.show_default)
        if isinstance(default_value, float):
            return f"{default_value:g}"
        return str(shown(default_value=default_value, show_default_is_str=False, **more))

    parameter._get_default_string = as_typed


def show_range_as_typed(parameter: Any) -> None:
    """Makes help show the bounds of a number as one would type them: `0<=x<=1` for 0.0 and 1.0.

    Written against typer 0.29. If it breaks, look at `_get_number_range_help_str` in `core.py`.
    """
    shown = parameter._get_number_range_help_str

    def as_typed() -> str | None:
        bounds = shown()
        return None if bounds is None else re.sub(r"\.0(?!\d)", "", bounds)

    parameter._get_number_range_help_str = as_typed


def show_required_plainly(argument: Any) -> None:
    """Makes the usage line show an argument that is required as `NAME`, where typer puts braces around it.

    Written against typer 0.29. If it breaks, look at `_usage_display_name` in `core.py`.
    """
    shown = argument._usage_display_name
    argument._usage_display_name = lambda: re.sub(r"^\{(.*)\}", r"\1", shown())
