"""Errors in Anthropic's format."""

from __future__ import annotations

from typing import Any

from split_device.serving.fields import ApiError

#: Requests of paths that begin so are answered in Anthropic's format, errors included.
MESSAGES_PATH = "/v1/messages"
COUNT_PATH = f"{MESSAGES_PATH}/count_tokens"

#: Anthropic's names of errors, by status code.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    503: "overloaded_error",
}


def error_object(error: ApiError, request_id: str) -> dict[str, Any]:
    """The body of an answer, or the data of an event, that says why a request failed."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": request_id}
