"""Chat and text completions by a language model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from split_device.serving.answering import Answer, comment, event
from split_device.serving.choices import Choice
from split_device.serving.http import Handler, api_error, json_response, read_json
from split_device.serving.openai.answers import Header, chat_choice, chat_piece, chunk, completion, usage_chunk
from split_device.serving.openai.query import CompletionQuery
from split_device.serving.openai.requests import COMPLETION_PATHS, parse
from split_device.serving.openai.text_answers import TextChoice, likeliest
from split_device.serving.openai.usage import Usage
from split_device.serving.request_ids import request_id
from split_device.serving.streaming import ChoiceStream, Notice
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
        # As in vLLM, the id of the answer is that of the request, behind its kind.
        header = Header(kind, request_id(request), int(time.time()), query.model)
        with Answer(request) as answer:
            await self._begin(query, answer, header.request_id)
            if query.stream:
                return answer.events(_events(query, answer, header))
            choices = await answer.whole()
        usage = _usage(query, answer, sum(choice.tokens for choice in choices))
        return json_response(completion(header, usage, _written(query, answer, choices)))

    async def _begin(self, query: CompletionQuery, answer: Answer, id_: str) -> None:
        """Starts the choices. Raises ApiError for a model that is not served, and what `ChoiceStream` raises."""
        adapter = self._model.adapter(query.model)
        # The best ones are chosen by their log probabilities.
        logprobs = 0 if query.logprobs is None and query.kept < query.per_prompt else query.logprobs
        prompt: list[int] = []
        for index, task in enumerate(query.tasks):
            if index % query.per_prompt == 0:
                prompt = await self._model.encode(task)
            answer.streams.append(
                self._model.stream(
                    task,
                    prompt,
                    logprobs=logprobs,
                    prompt_logprobs=query.logprobs if query.echo else None,
                    request_id=id_,
                    index=index,
                    adapter=adapter,
                )
            )


def _written(query: CompletionQuery, answer: Answer, choices: list[Choice]) -> list[dict[str, Any]]:
    """The choices of a whole answer: of each prompt those that are kept."""
    if query.kind == "chat":
        return [chat_choice(index, choice) for index, choice in enumerate(choices)]
    kept = [*range(len(choices))]
    if query.kept < query.per_prompt:
        kept = [
            first + place
            for first in range(0, len(choices), query.per_prompt)
            for place in likeliest(choices[first : first + query.per_prompt], query.kept)
        ]
    return [
        _text_choice(query, index, answer.streams[number]).fields(_asked(query, choices[number]))
        for index, number in enumerate(kept)
    ]


def _asked(query: CompletionQuery, choice: Choice) -> Choice:
    """A choice without log probabilities that nobody asked for."""
    return choice if query.logprobs is not None else dataclasses.replace(choice, logprobs=None)


def _text_choice(query: CompletionQuery, index: int, stream: ChoiceStream) -> TextChoice:
    return TextChoice(index, stream.prompt_piece if query.echo else None, prompt_alone=query.prompt_alone)


def _usage(query: CompletionQuery, answer: Answer, tokens: int) -> Usage:
    prompts = answer.streams[:: query.per_prompt]
    return Usage(
        sum(stream.prompt_tokens for stream in prompts),
        0 if query.prompt_alone else tokens,
        sum(stream.cached_tokens for stream in prompts),
    )


async def _events(query: CompletionQuery, answer: Answer, header: Header) -> AsyncIterator[str]:
    """Server-sent events of all choices, in order of arrival."""
    tokens = 0
    begun: set[int] = set()
    texts = [_text_choice(query, *each) for each in enumerate(answer.streams)]
    try:
        async for index, piece in answer.pieces():
            if isinstance(piece, Notice):
                yield comment(piece)
                continue
            tokens += piece.tokens
            if query.kind == "text":
                written = texts[index].fields(piece)
            else:
                written = chat_piece(index, piece, index not in begun)
            begun.add(index)
            yield event(chunk(header, written))
    except Exception as error:
        yield event({"error": api_error(error).fields()})
        return
    if query.include_usage:
        yield event(usage_chunk(header, _usage(query, answer, tokens)))
    yield "data: [DONE]\n\n"
