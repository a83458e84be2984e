"""Grammars of JSON between fixed texts, as calls of tools are written: `<tool_call>{"name": …}</tool_call>`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from split_common.errors import ConfigError
from split_device.generation.grammar_check import JSON_OPTIONS, STRICT, cleaned
from split_device.generation.structured import StructuredOutputs

#: How the JSON of calls is written, as Python does: so the whitespace costs no choice.
_SPACED: dict[str, Any] = {
    **STRICT,
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class Tag(msgspec.Struct, frozen=True, kw_only=True):
    """JSON of a schema, with the text before and after it. Without a schema, `begin` and `end` alone."""

    begin: str
    schema: dict[str, Any] | bool | None = None
    end: str = ""
    #: Whether the model chooses the whitespace, as in `StructuredOutputs.json`. If not, a space follows each comma
    #: and colon.
    flexible: bool = False


def tagged(
    tags: Sequence[Tag],
    *,
    several: bool = False,
    before: str = "",
    separator: str = "",
    after: str = "",
    trigger: str = "",
    special: Mapping[str, int] | None = None,
) -> StructuredOutputs:
    """A constraint to one of some tags, or to several after each other.

    Example: an answer that calls one of two tools::

        tagged([Tag(begin='{"name": "%s", "arguments": ' % name, schema=schema, end="}") for name, schema in tools])

    Args:
        tags: at least one.
        several: whether more than one may come, with `separator` between them.
        before, after: texts around all of them.
        trigger: if it is not empty, any text may come, and the answer may end with it. Where it holds `trigger`, a
            tag has to follow, whose `begin` is what comes after the trigger. `before`, `separator` and `after` do
            not count then.
        special: ids of special and added tokens by how they are written. In the fixed texts they are these tokens,
            and not the characters. A constraint with them fits one tokenizer alone.

    Raises:
        ConfigError: there is no tag, or a keyword of a schema has a wrong type.
    """
    if not tags:
        raise ConfigError("structured outputs: there is no tag")
    special = special or {}
    rules = [_rule(index, tag, special) for index, tag in enumerate(tags)]
    one = " | ".join(f"tag_{index}" for index in range(len(tags)))
    if trigger:
        head = ["start: (triggered any)* TEXT", *_triggered(trigger, special), "TEXT: /(.|\\n)*/"]
    else:
        more = f"({_literal(separator, special)} any)*" if several else ""
        head = [
            " ".join(filter(None, ("start:", _literal(before, special), "any", more, _literal(after, special))))
        ]
    return StructuredOutputs(grammar="\n".join([*head, f"any: {one}", *rules]) + "\n")


def _triggered(trigger: str, special: Mapping[str, int]) -> list[str]:
    if trigger in special:
        return [f"triggered: TEXT {_literal(trigger, special)}"]
    return [f"triggered[lazy]: TEXT {json.dumps(trigger)}"]


def _rule(index: int, tag: Tag, special: Mapping[str, int]) -> str:
    parts = [_literal(tag.begin, special)]
    if tag.schema is not None and tag.schema is not False:
        parts.append(f"%json {_schema(tag.schema, JSON_OPTIONS if tag.flexible else _SPACED)}")
    parts.append(_literal(tag.end, special))
    return f"tag_{index}: " + " ".join(filter(None, parts))


def _schema(schema: dict[str, Any] | bool, options: dict[str, Any]) -> str:
    try:
        plain = cleaned({} if schema is True else schema)
        return json.dumps({**plain, "x-guidance": options})
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"structured outputs: {error}") from None


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A fixed text in Lark's notation; empty for none."""
    if not special:
        return json.dumps(text) if text else ""
    pattern = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    parts = re.split(f"({pattern})", text)
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)
