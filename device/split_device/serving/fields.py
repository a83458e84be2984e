"""Fields of requests in OpenAI's formats: which have an effect, what they convert to, and how errors name them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from split_common.errors import ConfigError, SplitError
from split_device.generation.settings import BOUNDS, within_bounds

_T = TypeVar("_T")

#: Fields that have the bounds of another one.
_BOUNDED = {"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens"}

#: What msgspec says of a field in a message about the whole object, and what is said here.
_FIELD_ERRORS = {"contains unknown": "unknown field", "missing required": "required"}


class ApiError(SplitError):
    """A request that is refused or failed, as an error of OpenAI's format."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type_
        self.param = param
        self.code = code
        self.headers = headers

    def fields(self) -> dict[str, Any]:
        return {"message": str(self), "type": self.type, "param": self.param, "code": self.code}


def check_model(asked: str, names: Sequence[str], others: Sequence[str] = (), kind: str = "images") -> None:
    """Raises ApiError if the request names none of the models that answer it.

    Args:
        others: names of models that are served for something else.
        kind: what those make.
    """
    if asked not in names:
        found = [*names, *(f"{name} (for {kind})" for name in others)]
        here = f"the model here is {found[0]}" if len(found) == 1 else f"the models here: {', '.join(found)}"
        raise ApiError(here, 404, param="model", code="model_not_found")


def present(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null: a null is as good as an absent field."""
    return {name: value for name, value in fields.items() if value is not None}


def supported(
    body: object, ignored: Collection[str], neutral: Mapping[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """The fields of an object that have an effect: not null, not ignored, and not at a neutral value.

    Args:
        where: the object's path in the body, e.g. `messages[0]`; empty for the body itself.

    Raises:
        ApiError: it is not an object, or an unsupported field is not at a neutral value.
    """
    if not isinstance(body, dict):
        raise ApiError(f"{where or 'the body'} is not a JSON object", param=where or None)
    fields = {name: value for name, value in present(body).items() if name not in ignored}
    for name, values in neutral.items():
        if name in fields and not any(_same(fields[name], value) for value in values):
            path = f"{where}.{name}" if where else name
            raise ApiError(f"{path} is not supported", param=path, code="unsupported_parameter")
        fields.pop(name, None)
    return fields


def treated(used: Iterable[str], ignored: Iterable[str], refused: Iterable[str]) -> dict[str, str]:
    """What is done with each field of a body: "used", "ignored" or "refused"."""
    kinds = {"used": used, "ignored": ignored, "refused": refused}
    return {name: done for done, names in kinds.items() for name in sorted(names)}


def convert(fields: dict[str, Any], type_: type[_T], where: str = "") -> _T:
    """Converts fields to a struct; a number like 5.0 is an integer, too.

    Raises:
        ApiError: a field is wrong; the error has its path, which begins with `where`.
    """
    fields = {name: _number(name, value) for name, value in fields.items()}
    try:
        return msgspec.convert(fields, type_)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        path = where + at.rstrip("`")
        if found := re.fullmatch("Object (contains unknown|missing required) field `(.*)`", message, re.DOTALL):
            message, path = _FIELD_ERRORS[found[1]], f"{path}.{found[2]}"
        path = path.lstrip(".")
        # As in OpenAI's API, what is unknown is not a parameter.
        param = None if message == _FIELD_ERRORS["contains unknown"] else path or None
        raise ApiError(f"{path}: {message}" if path else message, param=param) from None


def _number(name: str, value: Any) -> Any:
    """A field's value; a number within its bounds, and as an integer if it is integral. Raises ApiError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if (bounded := _BOUNDED.get(name, name)) in BOUNDS:
        try:
            return within_bounds(bounded, value)
        except ConfigError:
            low, high, _ = BOUNDS[bounded]
            raise ApiError(f"{name}: {value} is not a number from {low} to {high}", param=name) from None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same(value: Any, other: Any) -> bool:
    """Equality in which False is not 0 and True is not 1."""
    return bool(value == other and isinstance(value, bool) == isinstance(other, bool))
