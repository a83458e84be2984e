"""Token ids of texts, and texts of token ids, in vLLM's format: `/tokenize` and `/detokenize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta
from starlette.requests import Request
from starlette.responses import Response

from split_device.jobs.job import Message, Task
from split_device.jobs.models import Loaded
from split_device.serving.fields import ApiError, convert, supported
from split_device.serving.http import Handler, json_response
from split_device.serving.openai.messages import parse_messages
from split_device.serving.text_model import TextModel, prompt_size

#: About how many bytes a token has in JSON, by its id or by its text.
TOKEN_BYTES = 10

#: Token ids, and how the tokenizer writes them if that is wanted.
_Found = tuple[list[int], list[str] | None]


class _Named(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None


class _Text(_Named, frozen=True, kw_only=True):
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class _Conversation(_Named, frozen=True, kw_only=True):
    messages: tuple[Message, ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class _Tokens(_Named, frozen=True, kw_only=True):
    tokens: list[Annotated[int, Meta(ge=0)]]


def _fields(body: object) -> dict[str, Any]:
    """The fields of a body, its messages parsed. Raises ApiError."""
    fields = supported(body, (), {})
    if "messages" in fields:
        fields["messages"] = parse_messages(fields["messages"])
    return fields


class Tokens:
    """Answers requests with the tokenizer of the model that is served."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """What answers which method and path."""
        return {("POST", "/tokenize"): self.tokenize, ("POST", "/detokenize"): self.detokenize}

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text, or of a conversation as a chat would send it. Raises ApiError."""
        fields = await self._model.parsed(request, _fields)
        ids, strings = await (self._conversation(fields) if "messages" in fields else self._text(fields))
        found = {"count": len(ids), "max_model_len": self._model.context, "tokens": ids, "token_strs": strings}
        # Millions of them are seconds of work.
        return await self._model.aside(TOKEN_BYTES * len(ids), json_response, found)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special tokens included. Raises ApiError."""
        body = await self._model.parsed(request, lambda body: convert(supported(body, (), {}), _Tokens))
        self._check(body)
        text = await self._model.beside(lambda loaded: _text_of(loaded, body.tokens), len(body.tokens))
        return await self._model.aside(TOKEN_BYTES * len(body.tokens), json_response, {"prompt": text})

    async def _text(self, fields: dict[str, Any]) -> _Found:
        body = convert(fields, _Text)
        self._check(body)

        def found(loaded: Loaded) -> _Found:
            ids = loaded.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
            return ids, _strings(loaded, ids, body.return_token_strs)

        return await self._model.beside(found, len(body.prompt))

    async def _conversation(self, fields: dict[str, Any]) -> _Found:
        body = convert(fields, _Conversation)
        self._check(body)
        if body.continue_final_message and body.add_generation_prompt:
            raise ApiError(
                "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
            )
        if not body.continue_final_message and not body.add_generation_prompt:
            raise ApiError(
                "add_generation_prompt: false needs continue_final_message: true: a conversation is answered or "
                "continued here",
                param="add_generation_prompt",
            )
        task = Task(
            model=self._model.choice,
            prompt=body.messages,
            chat_template=self._model.template.with_kwargs(body.chat_template_kwargs).unless_default(),
            continue_final_message=body.continue_final_message or UNSET,
        )

        def found(loaded: Loaded) -> _Found:
            ids = loaded.tokens(task)
            return ids, _strings(loaded, ids, body.return_token_strs)

        return await self._model.beside(found, prompt_size(task))

    def _check(self, body: _Named) -> None:
        """Raises ApiError if the body names another model."""
        if body.model is not None:
            self._model.adapter(body.model)


def _strings(loaded: Loaded, ids: list[int], wanted: bool) -> list[str] | None:
    """How the tokenizer writes the tokens, if that is wanted."""
    return list(loaded.tokenizer.convert_ids_to_tokens(ids)) if wanted else None


def _text_of(loaded: Loaded, tokens: list[int]) -> str:
    """The text of token ids. Raises ApiError for one that is none of the tokenizer's."""
    size = len(loaded.tokenizer)
    for index, token in enumerate(tokens):
        if token >= size:
            raise ApiError(f"tokens[{index}]: {token} is not one of {size} tokens", param=f"tokens[{index}]")
    return str(loaded.tokenizer.decode(tokens))
