"""Commands with dataclasses as parameters: each field is an option, with the dataclass's default."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin


class Group:
    """Marks a command's parameter, a dataclass, whose fields are options: `Annotated[Limits, Group(jobs=…)]`.

    Args:
        options: the annotation of each field that is an option. Other fields keep their default.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def plus(self, **options: Any) -> Group:
        """A copy with further options, which come first in the help."""
        return Group(**options, **self.options)

    def without(self, *fields: str) -> Group:
        """A copy without the options of these fields."""
        return Group(**{field: option for field, option in self.options.items() if field not in fields})


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces each group among a command's parameters by options for its fields, which Typer understands.

    The options' defaults are those of the group's default object, or else of an object made without arguments.
    Groups with a field of the same name share its option.

    Raises:
        TypeError: two different options have the same name.
    """
    parameters: dict[str, inspect.Parameter] = {}
    defaults: dict[str, Any] = {}
    fields: dict[str, list[str]] = {}

    def add(name: str, default: Any, annotation: Any) -> None:
        added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        if parameters.setdefault(name, added) != added:
            raise TypeError(f"{command.__name__}: two different options are called {name}")

    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        cls, group = _group(parameter.annotation)
        if group is None:
            add(name, parameter.default, parameter.annotation)
            continue
        defaults[name] = cls() if parameter.default is parameter.empty else parameter.default
        fields[name] = list(group.options)
        for field, option in group.options.items():
            add(field, getattr(defaults[name], field), option)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        groups = {
            name: dataclasses.replace(default, **{field: values[field] for field in fields[name]})
            for name, default in defaults.items()
        }
        in_groups = {field for names in fields.values() for field in names}
        command(**groups, **{name: value for name, value in values.items() if name not in in_groups})

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def _group(annotation: Any) -> tuple[Any, Group | None]:
    """A parameter's type, and its group if it is one."""
    if get_origin(annotation) is Annotated:
        cls, *metadata = get_args(annotation)
        for group in metadata:
            if isinstance(group, Group):
                return cls, group
    return annotation, None
