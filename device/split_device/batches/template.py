"""Templates of prompts: `Summarize: {text}`, filled in with the fields of a line."""

from __future__ import annotations

import re
from collections.abc import Mapping

from split_common.errors import ConfigError, SplitError
from split_common.system.text import json_line

#: A doubled brace, a field, or a brace that is neither.
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class UnknownField(SplitError):
    """A field of the template that a line does not have."""


class Template:
    """A text with fields in braces; `{{` and `}}` stand for braces.

    Raises:
        ConfigError: a brace has no counterpart, or the text has no field.
    """

    def __init__(self, text: str) -> None:
        #: Literal texts and names of fields in turn, a literal first and last.
        self._parts: list[str] = [""]
        end = 0
        for found in _PIECE.finditer(text):
            self._parts[-1] += text[end : found.start()]
            end = found.end()
            if found[1] is not None:
                self._parts += [found[1], ""]
            elif len(found[0]) == 2:
                self._parts[-1] += found[0][0]
            else:
                raise ConfigError(f"invalid template {text!r}: write {found[0] * 2} for a brace that is text")
        self._parts[-1] += text[end:]
        if not self.fields:
            raise ConfigError(f"invalid template {text!r}: it has no field, e.g. {{text}}")

    @property
    def fields(self) -> list[str]:
        return self._parts[1::2]

    def fill(self, values: Mapping[str, object]) -> str:
        """The text with values for its fields; what is not a text is written as JSON. Raises UnknownField."""
        for name in self.fields:
            if name not in values:
                known = ", ".join(map(repr, values)) or "none"
                raise UnknownField(f"the template's field {name!r} is not among the fields here: {known}")
        return "".join(_text(values[part]) if index % 2 else part for index, part in enumerate(self._parts))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json_line(value)
