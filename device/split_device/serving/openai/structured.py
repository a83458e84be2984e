"""Fields of requests that say what the answer has to look like: OpenAI's `response_format`, vLLM's own."""

from __future__ import annotations

from typing import Any

import msgspec

from split_common.errors import ConfigError, UnsupportedFeature
from split_device.generation.structured import StructuredOutputs
from split_device.serving.fields import ApiError, convert, present

#: The fields of a body.
FIELDS = ("response_format", "structured_outputs")


class _Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`json_schema` of a response format. Its schema is always enforced, also where `strict` is false."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class _Format(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    json_schema: _Schema | None = None


class _Structured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's field. A schema may be JSON text."""

    json: dict[str, Any] | bool | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None


def take_structured(fields: dict[str, Any]) -> StructuredOutputs | msgspec.UnsetType:
    """Takes the fields out of a body that say what the answer has to look like; UNSET for any text.

    Raises:
        ApiError: a field is wrong, both are given, or they say more than one thing.
    """
    given = {name: fields.pop(name) for name in FIELDS if fields.get(name) is not None}
    found = {
        "response_format": response_format(given.get("response_format")),
        "structured_outputs": _structured(given.get("structured_outputs")),
    }
    chosen = {name: value for name, value in found.items() if value is not msgspec.UNSET}
    if len(chosen) > 1:
        raise ApiError("response_format and structured_outputs exclude each other", param="structured_outputs")
    for name, value in chosen.items():
        checked(value, name)
        return value
    return msgspec.UNSET


def response_format(value: Any, where: str = "response_format") -> StructuredOutputs | msgspec.UnsetType:
    """A response format; UNSET for none, or for text. Raises ApiError."""
    if value is None:
        return msgspec.UNSET
    given = convert(_object(value, where, ("json_schema",)), _Format, where)
    if given.type == "text" and given.json_schema is None:
        return msgspec.UNSET
    if given.type == "json_object" and given.json_schema is None:
        return StructuredOutputs(json_object=True)
    if given.type == "json_schema":
        if given.json_schema is None or given.json_schema.schema is None:
            missing = f"{where}.json_schema" + ("" if given.json_schema is None else ".schema")
            raise ApiError(f"{missing}: required", param=missing)
        return StructuredOutputs(json=given.json_schema.schema)
    if given.json_schema is not None:
        raise ApiError(f"{where}.json_schema needs the type json_schema", param=f"{where}.json_schema")
    raise ApiError(
        f"{where}.type: {given.type} is not one of text, json_object and json_schema",
        param=f"{where}.type",
        code="unsupported_parameter",
    )


def checked(value: StructuredOutputs, where: str) -> None:
    """Raises ApiError, which names the field, if not exactly one constraint is given, or it is too large."""
    try:
        value.source()
    except (ConfigError, UnsupportedFeature) as error:
        raise ApiError(str(error), param=where) from None


def _structured(value: Any) -> StructuredOutputs | msgspec.UnsetType:
    if value is None:
        return msgspec.UNSET
    where = "structured_outputs"
    given = convert(_object(value, where), _Structured, where)
    schema = given.json
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any] | bool)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ApiError(f"{where}.json is not a JSON Schema: {error}", param=f"{where}.json") from None
    return StructuredOutputs(
        json=schema,
        json_object=given.json_object or None,
        regex=given.regex,
        choice=given.choice,
        grammar=given.grammar,
    )


def _object(value: Any, where: str, inner: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object without nulls. Raises ApiError if it is something else."""
    if not isinstance(value, dict):
        raise ApiError(f"{where}: expected an object", param=where)
    return {
        name: present(each) if name in inner and isinstance(each, dict) else each
        for name, each in present(value).items()
    }
