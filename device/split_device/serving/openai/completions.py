"""Chat and text completions by a language model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping

from starlette.requests import Request
from starlette.responses import Response

from split_device.serving.answering import Answer, comment, event
from split_device.serving.http import Handler, api_error, json_response, read_json
from split_device.serving.openai.answers import Header, chunk, completion, usage_chunk
from split_device.serving.openai.query import CompletionQuery
from split_device.serving.openai.requests import COMPLETION_PATHS, parse
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
        # As in vLLM, the id of the answer is that of the request, behind its kind.
        id_ = request_id(request)
        header = Header(kind, id_, int(time.time()), query.model)
        prompt: list[int] = []
        with Answer(request) as answer:
            for index, task in enumerate(query.tasks):
                if index % query.per_prompt == 0:
                    prompt = await model.encode(task)
                answer.streams.append(
                    model.stream(
                        task,
                        prompt,
                        logprobs=query.logprobs,
                        request_id=id_,
                        index=index,
                        adapter=adapter,
                    )
                )
            if query.stream:
                return answer.events(_events(query, answer, header))
            choices = await answer.whole()
        return json_response(completion(header, answer.streams[0].prompt_tokens, choices))


async def _events(query: CompletionQuery, answer: Answer, header: Header) -> AsyncIterator[str]:
    """Server-sent events of all choices, in order of arrival."""
    tokens = 0
    begun: set[int] = set()
    try:
        async for index, piece in answer.pieces():
            if isinstance(piece, Notice):
                yield comment(piece)
                continue
            tokens += piece.tokens
            yield event(chunk(header, index, piece, index not in begun))
            begun.add(index)
    except Exception as error:
        yield event({"error": api_error(error).fields()})
        return
    if query.include_usage:
        yield event(usage_chunk(header, answer.streams[0].prompt_tokens, tokens))
    yield "data: [DONE]\n\n"
