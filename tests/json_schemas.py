"""JSON Schemas over all keywords that are enforced, small so that answers end; and some that are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

#: Formats that `jsonschema` checks without further packages, and others.
CHECKED_FORMATS = ("date", "email", "ipv4", "ipv6", "uuid")
FORMATS = (*CHECKED_FORMATS, "date-time", "time", "duration", "hostname", "uri")

_NAMES = ("city", "days", "customer_name", "is_open", "price", "notes", "first_visit", "kind")
_WORDS = ("red", "green", "blue", "north", "south", "yes", "no")
_PATTERNS = ("^[a-z]{2,6}$", "^[A-Z][0-9]{3}$", "^(ab|cd)+$", "[0-9]-[0-9]$", "^\\d{4}$", "^\\w{1,8}$", "^a.c$")
_DRAFT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def _string(draw: random.Random) -> Schema:
    least = draw.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randrange(1, 12)}


def _pattern(draw: random.Random) -> Schema:
    schema: Schema = {"type": "string", "pattern": draw.choice(_PATTERNS)}
    return schema | ({"maxLength": 10} if draw.random() < 0.7 or "+" in schema["pattern"] else {"maxLength": 12})


def _format(draw: random.Random) -> Schema:
    name = draw.choice(FORMATS)
    return {"type": "string", "format": name, **({"maxLength": 30} if name in ("email", "hostname", "uri") else {})}


def _integer(draw: random.Random) -> Schema:
    low = draw.randrange(-50, 50)
    schema: Schema = {"type": "integer", draw.choice(("minimum", "exclusiveMinimum")): low}
    schema[draw.choice(("maximum", "exclusiveMaximum"))] = low + draw.randrange(20, 900)
    return schema | ({"multipleOf": draw.choice((2, 5, 7))} if draw.random() < 0.4 else {})


def _number(draw: random.Random) -> Schema:
    low = draw.randrange(-20, 20) / 4
    schema: Schema = {"type": "number", "minimum": low, "exclusiveMaximum": low + draw.randrange(1, 40) / 2}
    return schema | {"multipleOf": 0.25}


def _values(draw: random.Random) -> Schema:
    some: list[Any] = [*draw.sample(_WORDS, 2), draw.randrange(9), None, True, {"a": [1, "é"]}, "two words", 'a"b']
    return (
        {"enum": draw.sample(some, draw.randrange(1, 5))} if draw.random() < 0.7 else {"const": draw.choice(some)}
    )


def _plain(draw: random.Random) -> Schema:
    kinds = [["boolean"], ["null"], ["boolean", "null"], ["integer", "null"]]
    kind = draw.choice(kinds)
    schema: Schema = {"type": kind[0] if len(kind) == 1 else kind}
    return schema | ({"minimum": 0, "maximum": 99} if "integer" in kind else {})


_LEAVES = (_string, _pattern, _format, _integer, _number, _values, _plain)


def _leaf(draw: random.Random) -> Schema:
    return draw.choice(_LEAVES)(draw)


def _array(draw: random.Random) -> Schema:
    least = draw.randrange(3)
    return {"type": "array", "items": _leaf(draw), "minItems": least, "maxItems": least + draw.randrange(1, 3)}


def _tuple(draw: random.Random) -> Schema:
    first = [_leaf(draw) for _ in range(draw.randrange(1, 4))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": draw.randrange(len(first) + 1)}


def _object(draw: random.Random, inner: Callable[[random.Random], Schema] = _leaf) -> Schema:
    names = draw.sample(_NAMES, draw.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: inner(draw) for name in names},
        "required": draw.sample(names, draw.randrange(len(names) + 1)),
        "additionalProperties": False,
    }


def _map(draw: random.Random) -> Schema:
    schema: Schema = {"type": "object", "additionalProperties": False, "minProperties": 1, "maxProperties": 2}
    if draw.random() < 0.5:
        return schema | {"patternProperties": {"^[a-c]{1,3}$": _leaf(draw)}}
    return schema | {"patternProperties": {"^k[0-9]$": _leaf(draw), "^v[0-9]$": _leaf(draw)}}


def _open(draw: random.Random) -> Schema:
    return {"type": "object", "additionalProperties": _plain(draw), "maxProperties": draw.randrange(1, 3)}


def _any_of(draw: random.Random) -> Schema:
    return {"anyOf": [_leaf(draw), _array(draw), _object(draw)][: draw.randrange(2, 4)]}


def _one_of(draw: random.Random) -> Schema:
    kinds = [
        {"type": "string", "maxLength": 5},
        {"type": "integer", "minimum": 0, "maximum": 9},
        {"type": "boolean"},
    ]
    if draw.random() < 0.5:
        return {"oneOf": draw.sample(kinds, draw.randrange(2, 4))}
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "value": _leaf(draw)},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for kind in draw.sample(_WORDS, 2)
        ]
    }


def _all_of(draw: random.Random) -> Schema:
    if draw.random() < 0.5:
        low = draw.randrange(50)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 100}, {"multipleOf": 3}]}
    names = draw.sample(_NAMES, 2)
    parts = [{"type": "object", "properties": {name: _leaf(draw)}, "required": [name]} for name in names]
    return {"allOf": [*parts, {"maxProperties": 2}]}


def _reference(draw: random.Random) -> Schema:
    where = draw.choice(("$defs", "definitions"))
    item = {"$ref": f"#/{where}/item"}
    return {
        "$schema": _DRAFT,
        "title": "Order",
        "description": "What was ordered.",
        "type": "object",
        "properties": {"first": item, "more": {"type": "array", "items": item, "maxItems": 2}},
        "required": ["first", "more"],
        "additionalProperties": False,
        where: {"item": _leaf(draw) | {"$comment": "c", "examples": [1], "default": 1, "deprecated": False}},
    }


def _recursive(draw: random.Random) -> Schema:
    return {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": _leaf(draw),
                    "children": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            },
            "leaf": {"$anchor": "leaf", **_plain(draw)},
        },
    }


def _nested(draw: random.Random) -> Schema:
    return _object(draw, lambda each: each.choice((_object, _array, _tuple, _leaf, _one_of))(each))


_FAMILIES = (
    *_LEAVES,
    *(_array, _tuple, _object, _map, _open, _any_of, _one_of, _all_of, _reference, _recursive, _nested, _nested),
)

#: Schemas that cannot be enforced, by what the refusal names.
REFUSED: dict[str, Schema] = {
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "minContains": {"type": "array", "contains": {"const": 1}, "minContains": 2},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {}}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "not": {"not": {"type": "integer"}},
    "if": {"if": {"type": "integer"}, "then": {"minimum": 3}},
    "$dynamicRef": {"properties": {"a": {"$dynamicRef": "#x"}}},
    "idn-email": {"type": "string", "format": "idn-email"},
    "oneOf": {"oneOf": [{"type": "integer"}, {"minimum": 2}]},
    "look-around": {"type": "string", "pattern": "^(?!a)b"},
    "backreferences": {"type": "string", "pattern": "^(a)\\1$"},
}


def schemas(count: int) -> list[Schema]:
    """So many schemas, the same each time, of all families in turn; the last ones are refused."""
    draw = random.Random(16)
    refused = list(REFUSED.values())[: count // 20]
    return [*(_FAMILIES[index % len(_FAMILIES)](draw) for index in range(count - len(refused))), *refused]
