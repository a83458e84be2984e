"""`/v1/responses`: answers in the format of the Responses API, and those that are kept."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from split_device.jobs.job import Message
from split_device.serving.answering import Answer, comment, event
from split_device.serving.fields import ApiError
from split_device.serving.http import Handler, api_error, json_response
from split_device.serving.openai.responses.answers import ResponseEvents, ResponseWriter, response_id
from split_device.serving.openai.responses.items import parse_items
from split_device.serving.openai.responses.paths import ITEMS_PATH, RESPONSE_PATH, RESPONSES_PATH
from split_device.serving.openai.responses.requests import ResponseRequest, parse_response
from split_device.serving.openai.responses.store import ResponseStore, StoredResponse
from split_device.serving.parts import PartEvent, Parts, whole
from split_device.serving.request_ids import request_id
from split_device.serving.streaming import Notice
from split_device.serving.text_model import TextModel
from split_device.sessions.identity import new_request_id

#: How many of the latest ids are remembered: more than requests are answered at once.
GIVEN = 4096

#: Down to which depth an event is written in pieces: that of the tokens with log probabilities in a whole response.
EVENT_DEPTH = 7

#: About how many bytes an item of a conversation has.
ITEM_BYTES = 1024


class Responses:
    """Answers requests with the model that is served."""

    def __init__(self, model: TextModel, store: ResponseStore) -> None:
        self._model = model
        self._store = store
        #: Ids that were given to responses of late, which may not have been stored yet. The oldest one goes first.
        self._given: OrderedDict[str, None] = OrderedDict()

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """What answers which method and path."""
        return {
            ("POST", RESPONSES_PATH): self.create,
            ("GET", RESPONSE_PATH): self.get,
            ("DELETE", RESPONSE_PATH): self.delete,
            ("GET", ITEMS_PATH): self.items,
        }

    async def create(self, request: Request) -> Response:
        """Answers a request for a response. Raises ApiError, and other errors that `api_error` reports."""
        asked = await self._model.parsed(request, lambda body: parse_response(body, self._model))
        adapter = self._model.adapter(asked.body.model)
        if asked.body.store or asked.previous is not None:
            await self._store.check()
        query = asked.query(await self._before(asked.previous))
        (task,) = query.tasks
        prompt = await self._model.encode(task)
        id_ = request_id(request)
        unique = await self._unique(asked, id_)
        with Answer(request) as answer:
            stream = await self._model.begin(answer, task, prompt, request_id=id_, adapter=adapter)
            writer = ResponseWriter(
                unique, int(time.time()), asked.echoed, asked.names, len(prompt), lambda: stream.cached_tokens
            )
            if query.stream:
                return answer.events(self._events(asked, answer, writer, task.logprobs or 0))
            (choice,) = await answer.whole()
        size = _bytes(choice.tokens, task.logprobs or 0)
        response = await self._model.aside(size, lambda: writer.response(whole(choice)))
        await self._keep(asked, response)
        return await self._model.aside(size, lambda: json_response(response, depth=EVENT_DEPTH - 1))

    async def _unique(self, asked: ResponseRequest, id_: str) -> str:
        """What ids of a response have in common: the id of the request, unless a response has it that is kept."""
        if not asked.body.store:
            return id_
        given = id_ in self._given
        self._given[id_] = None
        if len(self._given) > GIVEN:
            self._given.popitem(last=False)
        return new_request_id() if given or await self._store.has(response_id(id_)) else id_

    async def _before(self, previous: str | None) -> list[Message]:
        """What was said in the response with this id, in those before it, and what they answered."""
        chain = [] if previous is None else await self._store.chain(previous)
        said = [item for stored in chain for item in (*stored.input, *stored.response["output"])]
        return await self._model.aside(ITEM_BYTES * len(said), parse_items, said)

    async def _keep(self, asked: ResponseRequest, response: dict[str, Any]) -> None:
        if asked.body.store:
            stored = StoredResponse(
                id=response["id"], previous=asked.previous, input=asked.items, response=response
            )
            await self._store.put(stored)

    async def _events(
        self, asked: ResponseRequest, answer: Answer, writer: ResponseWriter, logprobs: int
    ) -> AsyncIterator[str]:
        """The events of one response, from its creation to its end.

        Args:
            logprobs: how many other tokens are told of at each token.
        """
        events, parts = ResponseEvents(writer), Parts()

        def written(data: dict[str, Any], depth: int = 0) -> str:
            return event(data, str(data["type"]), depth)

        async def whole_part(happened: PartEvent) -> list[str]:
            """What is told of a part again when it ends. With log probabilities, it may be much."""
            return await self._model.aside(
                _bytes(parts.tokens, logprobs),
                lambda: [written(data, EVENT_DEPTH) for data in events.part(happened)],
            )

        for first in events.begin():
            yield written(first)
        failure: ApiError | None = None
        try:
            async for _, piece in answer.pieces():
                if isinstance(piece, Notice):
                    yield comment(piece)
                    continue
                for happened in parts.push(piece):
                    if happened.kind == "end":
                        for text in await whole_part(happened):
                            yield text
                        continue
                    for data in events.part(happened):
                        yield written(data)
            if asked.body.store:
                size = _bytes(parts.tokens, logprobs)
                await self._keep(asked, await self._model.aside(size, writer.response, parts))
        except Exception as error:
            failure = api_error(error)
        yield await self._model.aside(
            _bytes(parts.tokens, logprobs),
            lambda: written(events.end(writer.response(parts, failure)), EVENT_DEPTH),
        )

    async def get(self, request: Request) -> Response:
        """A response that is kept."""
        stored = await self._stored(request)
        if request.query_params.get("stream", "false").lower() == "true":
            raise ApiError("a stored response is not streamed", param="stream", code="unsupported_parameter")
        return await self._model.aside(0, json_response, stored.response)

    async def items(self, request: Request) -> Response:
        """The items of the input of a response that is kept, the last one first unless it is asked otherwise."""
        stored = await self._stored(request)
        if given := [name for name in ("after", "limit") if name in request.query_params]:
            raise ApiError(
                f"{given[0]}: all items are listed at once", param=given[0], code="unsupported_parameter"
            )
        ascending = request.query_params.get("order", "desc") == "asc"
        return await self._model.aside(0, lambda: json_response(_listed(stored, ascending)))

    async def delete(self, request: Request) -> Response:
        """Forgets a response."""
        id_ = request.path_params["id"]
        await self._store.delete(id_)
        return json_response({"id": id_, "object": "response", "deleted": True})

    async def _stored(self, request: Request) -> StoredResponse:
        return await self._store.get(request.path_params["id"])


def _listed(stored: StoredResponse, ascending: bool) -> dict[str, Any]:
    """The items of a response's input as a list."""
    prefix = stored.id.removeprefix("resp_")
    items = [{"id": f"item_{prefix}_{index}", **item} for index, item in enumerate(stored.input)]
    if not ascending:
        items.reverse()
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
    return {"object": "list", "data": items, **ends, "has_more": False}


def _bytes(tokens: int, logprobs: int) -> int:
    """About how many bytes an answer of so many tokens has, with what is told of so many others at each."""
    return ITEM_BYTES * tokens * (logprobs + 1)
