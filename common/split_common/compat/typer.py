"""What is private in typer. Written against 0.29."""

from __future__ import annotations

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
