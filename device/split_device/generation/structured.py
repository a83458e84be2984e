"""What an answer has to look like: a JSON Schema, a regular expression, one of several texts, or a grammar."""

from __future__ import annotations

from typing import Any

import msgspec


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """A constraint on the text of an answer, by vLLM's names. Exactly one field is set."""

    #: A JSON Schema; an empty one stands for any JSON object's or value's schema.
    json: dict[str, Any] | bool | None = None
    #: Any JSON object, as OpenAI's `json_object`.
    json_object: bool | None = None
    regex: str | None = None
    #: The answer is one of these texts.
    choice: tuple[str, ...] | None = None
    #: A context-free grammar, in Lark's or GBNF's notation.
    grammar: str | None = None
