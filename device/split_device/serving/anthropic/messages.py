"""Messages by a language model, in Anthropic's format."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from starlette.requests import Request
from starlette.responses import Response

from split_device.serving.answering import Answer, comment, event
from split_device.serving.anthropic.answers import block_event, end_events, message
from split_device.serving.anthropic.errors import COUNT_PATH, MESSAGES_PATH, error_object
from split_device.serving.anthropic.requests import MessageQuery, parse_count, parse_message
from split_device.serving.http import Handler, api_error, json_response
from split_device.serving.parts import Parts, whole
from split_device.serving.request_ids import request_id
from split_device.serving.streaming import Notice
from split_device.serving.text_model import TextModel


class Messages:
    """Answers requests with the model that is served."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """What answers which method and path."""
        return {("POST", MESSAGES_PATH): self.create, ("POST", COUNT_PATH): self.count}

    async def create(self, request: Request) -> Response:
        """Answers a request for a message. Raises ApiError, and other errors that `api_error` reports."""
        query = await self._model.parsed(request, lambda body: parse_message(body, self._model))
        adapter = self._model.adapter(query.model)
        prompt = await self._model.encode(query.task)
        id_ = request_id(request)
        with Answer(request) as answer:
            await self._model.begin(answer, query.task, prompt, request_id=id_, adapter=adapter)
            if query.stream:
                return answer.events(_events(query, answer, id_))
            (choice,) = await answer.whole()
        cached = answer.streams[0].cached_tokens
        return json_response(message(id_, query.model, len(prompt), whole(choice), cached))

    async def count(self, request: Request) -> Response:
        """Counts the tokens of a prompt. Raises ApiError."""
        query = await self._model.parsed(request, lambda body: parse_count(body, self._model))
        self._model.adapter(query.model)
        prompt = await self._model.encode(query.task)
        return json_response({"input_tokens": len(prompt)})


async def _events(query: MessageQuery, answer: Answer, id_: str) -> AsyncIterator[str]:
    """The events of one message: its beginning, its blocks, and its end."""
    parts = Parts()
    prompt_tokens = answer.streams[0].prompt_tokens

    def written(data: dict[str, object]) -> str:
        return event(data, str(data["type"]))

    yield written({"type": "message_start", "message": message(id_, query.model, prompt_tokens, parts)})
    yield written({"type": "ping"})
    try:
        async for _, piece in answer.pieces():
            if isinstance(piece, Notice):
                yield comment(piece)
                continue
            for happened in parts.push(piece):
                yield written(block_event(happened))
    except Exception as error:
        yield written(error_object(api_error(error), id_))
        return
    for last in end_events(prompt_tokens, parts, answer.streams[0].cached_tokens):
        yield written(last)
