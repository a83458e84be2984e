"""What an answer has to look like: a JSON Schema, a regular expression, one of several texts, or a grammar."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from split_common.errors import ConfigError, UnsupportedFeature

#: Most bytes of a schema, regular expression or grammar, and of all choices together. Larger ones slow down each
#: token.
MAX_SOURCE = 128 * 1024

#: How a grammar is written.
SourceKind = Literal["json", "regex", "choice", "grammar"]


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A constraint on the text of an answer, by vLLM's names. Exactly one field is set.

    Between the parts of JSON may stand a space, or a line break and up to 20 spaces. Expressions match the whole
    answer.
    """

    #: A JSON Schema. An empty one, or true, stands for any JSON value.
    json: dict[str, Any] | bool | None = None
    #: Any JSON object, as OpenAI's `json_object`.
    json_object: bool | None = None
    #: A regular expression in the syntax of Rust's `regex`: no look-around, no backreferences.
    regex: str | None = None
    #: The answer is one of these texts.
    choice: tuple[str, ...] | None = None
    #: A context-free grammar, in Lark's or GBNF's notation. `split_device.generation.tagged` makes some.
    grammar: str | None = None

    def source(self) -> Source:
        """The constraint as a text.

        Raises:
            ConfigError: not exactly one field is set, there is no choice, a text is not UTF-8, or it is too large.
            UnsupportedFeature: no answer fits the schema `false`.
        """
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)]
        if self.json is False:
            raise UnsupportedFeature("structured outputs: no answer fits the JSON Schema false")
        if len(given) != 1:
            raise ConfigError(
                f"structured outputs: give exactly one of {', '.join(self.__struct_fields__)}, "
                f"not {' and '.join(given) if given else 'none'}"
            )
        found = self._source()
        if len(found.text) > MAX_SOURCE or len(found.text.encode(errors="replace")) > MAX_SOURCE:
            raise ConfigError(f"structured outputs: {given[0]} is larger than {MAX_SOURCE:,} bytes")
        return found

    def _source(self) -> Source:
        if self.regex is not None:
            return Source("regex", self.regex)
        if self.grammar is not None:
            return Source("grammar", self.grammar)
        if self.choice is not None:
            if not self.choice:
                raise ConfigError("structured outputs: choice is empty")
            return Source("choice", _json(self.choice))
        schema = {"type": "object"} if self.json_object else {} if self.json is True else self.json
        return Source("json", _json(schema))


class Source(msgspec.Struct, frozen=True):
    """The text of a constraint, and how it is written: choices are a JSON array."""

    kind: SourceKind
    text: str


def _json(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"structured outputs: this cannot be written as JSON: {error}") from None
