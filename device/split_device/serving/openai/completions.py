"""Chat and text completions by a language model."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Mapping

from starlette.requests import Request
from starlette.responses import Response

from split_device.generation.settings import check_prompt_logprobs
from split_device.serving.answering import Answer, comment, event
from split_device.serving.http import Handler, api_error, json_response
from split_device.serving.openai.answers import Header, chat_piece, chunk, usage_chunk
from split_device.serving.openai.query import CompletionQuery
from split_device.serving.openai.requests import COMPLETION_PATHS, parse
from split_device.serving.openai.text_answers import TextChoice
from split_device.serving.openai.usage import Usage
from split_device.serving.openai.whole import completion
from split_device.serving.request_ids import request_id
from split_device.serving.streaming import Notice
from split_device.serving.text_model import TextModel

#: About how many bytes a token's text has in JSON, and a log probability.
TOKEN_BYTES = 8
LOGPROB_BYTES = 80


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
        query = await model.parsed(
            request,
            lambda body: parse(kind, body, model.choice, model.defaults, model.template),
        )
        # As in vLLM, the id of the answer is that of the request, behind its kind.
        header = Header(kind, request_id(request), int(time.time()), query.model)
        with Answer(request) as answer:
            await self._begin(query, answer, header.request_id)
            if query.stream:
                return answer.events(self._events(query, answer, header))
            choices = await answer.whole()
        usage = _usage(query, answer, sum(choice.tokens for choice in choices))
        prompts = [stream.prompt_piece for stream in answer.streams]
        return await model.aside(
            _size(query, answer, usage.completion),
            lambda: json_response(completion(header, query.form, usage, choices, prompts)),
        )

    async def _begin(self, query: CompletionQuery, answer: Answer, id_: str) -> None:
        """Starts the choices.

        Raises ApiError for a model that is not served, ConfigError for too many log probabilities of prompts, and
        what `ChoiceStream` raises.
        """
        adapter = self._model.adapter(query.model)
        prompt: list[int] = []
        scored, count = 0, query.form.per_prompt
        for index, task in enumerate(query.tasks):
            if index % count == 0:
                prompt = await self._model.encode(task)
                told = [each.prompt_logprobs for each in query.tasks[index : index + count]]
                asked = [most for most in told if isinstance(most, int)]
                scored += len(asked) * len(prompt)
                check_prompt_logprobs(scored, max(asked, default=0))
            await self._model.begin(answer, task, prompt, request_id=id_, index=index, adapter=adapter)

    async def _events(self, query: CompletionQuery, answer: Answer, header: Header) -> AsyncIterator[str]:
        """Server-sent events of all choices, in order of arrival."""
        tokens = 0
        begun: set[int] = set()
        echo, alone = query.form.echo, query.form.prompt_alone
        texts = [
            TextChoice(index, stream.prompt_piece if echo else None, prompt_alone=alone)
            for index, stream in enumerate(answer.streams)
        ]
        try:
            async for index, piece in answer.pieces():
                if isinstance(piece, Notice):
                    yield comment(piece)
                    continue
                tokens += piece.tokens
                first = index not in begun
                begun.add(index)
                written = functools.partial(texts[index].fields, piece)
                if query.form.kind == "chat":
                    written = functools.partial(chat_piece, index, piece, first)
                if first and echo:
                    # What is told of a prompt may be much.
                    fields = await self._model.aside(_size(query, answer, piece.tokens), written)
                else:
                    fields = written()
                written_chunk = chunk(header, fields)
                if query.usage_in == "all":
                    written_chunk["usage"] = _usage(query, answer, tokens).fields()
                yield event(written_chunk)
        except Exception as error:
            yield event({"error": api_error(error).fields()})
            return
        if query.usage_in != "none":
            yield event(usage_chunk(header, _usage(query, answer, tokens)))
        yield "data: [DONE]\n\n"


def _usage(query: CompletionQuery, answer: Answer, tokens: int) -> Usage:
    prompts = answer.streams[:: query.form.per_prompt]
    return Usage(
        sum(stream.prompt_tokens for stream in prompts),
        0 if query.form.prompt_alone else tokens,
        sum(stream.cached_tokens for stream in prompts),
        sum(stream.reasoning_tokens for stream in answer.streams) if query.form.kind == "chat" else None,
    )


def _size(query: CompletionQuery, answer: Answer, tokens: int) -> int:
    """About how many bytes an answer of so many tokens has, with what is told of its prompts."""
    told = [(stream.prompt_tokens, query.form.prompt_logprobs) for stream in answer.streams]
    told.append((tokens, query.form.logprobs))
    if query.form.echo:
        told += [(stream.prompt_tokens, query.form.logprobs) for stream in answer.streams]
    return sum(count * TOKEN_BYTES if most is None else count * LOGPROB_BYTES * (most + 1) for count, most in told)
