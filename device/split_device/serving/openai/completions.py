"""Chat and text completions by a language model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping

from starlette.requests import Request
from starlette.responses import Response

from split_device.serving.answering import Answer, comment, event
from split_device.serving.http import Handler, api_error, json_response, read_json
from split_device.serving.openai.answers import chunk, completion, usage_chunk
from split_device.serving.openai.requests import COMPLETION_PATHS, Query, parse
from split_device.serving.request_ids import request_id
from split_device.serving.streaming import Notice
from split_device.serving.text_model import TextModel


class Completions:
    """Answers requests with the model that is served."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """What answers which method and path."""
        return {("POST", path): self.complete for path in COMPLETION_PATHS}

    async def complete(self, request: Request) -> Response:
        """Answers a request. Raises ApiError, and other errors that `api_error` reports to the client."""
        model = self._model
        kind = COMPLETION_PATHS[request.url.path]
        query = parse(kind, await read_json(request), model.choice, model.defaults, model.template)
        adapter = model.adapter(query.model)
        # All choices have one prompt.
        prompt = await model.encode(query.tasks[0], query.continues)
        # As in vLLM, the id of the answer is that of the request, behind its kind.
        id_, created = request_id(request), int(time.time())
        with Answer(request) as answer:
            for index, task in enumerate(query.tasks):
                answer.streams.append(
                    model.stream(
                        task,
                        prompt,
                        logprobs=query.logprobs,
                        continues=query.continues,
                        request_id=id_,
                        index=index,
                        adapter=adapter,
                    )
                )
            if query.stream:
                return answer.events(_events(query, answer, id_, created))
            choices = await answer.whole()
        prompt_tokens = answer.streams[0].prompt_tokens
        return json_response(completion(query.kind, id_, created, query.model, prompt_tokens, choices))


async def _events(query: Query, answer: Answer, id_: str, created: int) -> AsyncIterator[str]:
    """Server-sent events of all choices, in order of arrival."""
    tokens = 0
    begun: set[int] = set()
    try:
        async for index, piece in answer.pieces():
            if isinstance(piece, Notice):
                yield comment(piece)
                continue
            tokens += piece.tokens
            yield event(chunk(query.kind, id_, created, query.model, index, piece, index not in begun))
            begun.add(index)
    except Exception as error:
        yield event({"error": api_error(error).fields()})
        return
    if query.include_usage:
        yield event(usage_chunk(query.kind, id_, created, query.model, answer.streams[0].prompt_tokens, tokens))
    yield "data: [DONE]\n\n"
