"""Every parameter of the released clients is one of the documented fields: used, ignored, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from anthropic.types.beta import message_count_tokens_params as beta_count
from anthropic.types.beta import message_create_params as beta_messages
from openai.types import completion_create_params as texts
from openai.types.chat import completion_create_params as chats
from openai.types.responses import response_create_params as responses

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"

#: Parameters that clients send as headers.
HEADERS = {"betas", "user_profile_id", "workspace_id"}


def documented(*headings: str) -> set[str]:
    """The fields in the tables below these headings, which the tests of the server compare with its code."""
    sections = dict(re.findall(r"^##+ (.*)\n((?:(?!##).*\n?)*)", DOCS.read_text(), re.MULTILINE))
    rows = [re.findall(r"^\| (`.*?`) \| \w+ \|", sections[heading], re.MULTILINE) for heading in headings]
    return {name for found in rows for names in found for name in re.findall("`(.*?)`", names)}


def parameters(*types: type) -> set[str]:
    return {name for type_ in types for base in type_.__mro__ for name in getattr(base, "__annotations__", {})}


@pytest.mark.parametrize(
    ("headings", "types"),
    [
        (("Fields of both", "Fields of chats"), chats.CompletionCreateParamsStreaming),
        (("Fields of both", "Fields of texts"), texts.CompletionCreateParamsStreaming),
        (("Responses",), responses.ResponseCreateParamsStreaming),
        (("Messages",), beta_messages.MessageCreateParamsStreaming),
        (("Messages",), beta_count.MessageCountTokensParams),
    ],
)
def test_each_parameter_is_documented(headings: tuple[str, ...], types: type) -> None:
    assert parameters(types) - HEADERS <= documented(*headings)
