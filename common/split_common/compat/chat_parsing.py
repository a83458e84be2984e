"""What is private in transformers' parser of answers. Written against 5.24."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_parsing import ResponseParser


class RegionParser(ResponseParser):  # type: ignore[misc]
    """transformers' incremental parser of answers, which also reads those that are not what their template expects.

    The event `region_open` of a region with a marker has, beside what transformers documents, the groups that the
    marker captured, as `captures`, and the marker itself, as `opened`. If what is in a region cannot be parsed, its
    `region_close` has no `value` but the text, as `body`, and parsing goes on.

    Args:
        response_template: as transformers documents it.
        prefix: the prompt, or what of it belongs to the answer.
        tools: in the form of `apply_chat_template`; the types of their parameters are those of what a call has.

    Raises:
        ValueError: the template is not one.

    Written against transformers 5.24. If it breaks, look at `ResponseParser._open_explicit` and `_close_current` in
    `utils/chat_parsing/response_parser.py`.
    """

    def _open_explicit(self, events: list[dict[str, Any]], field: Any, m: Any) -> None:
        super()._open_explicit(events, field, m)
        events[-1] |= {"captures": dict(self._captures), "opened": m.group()}

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        field, body = self._current, self._body
        try:
            super()._close_current(events)
        except (ValueError, KeyError, TypeError, RecursionError):
            events.append({"type": "region_close", "field": field, "body": body})
            self._reset_to_implicit()
