"""Requests in OpenAI's formats, parsed into tasks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from split_device.generation.chat_template import ChatTemplate
from split_device.generation.settings import Sampling, nth_seed
from split_device.jobs.job import Message, ModelChoice, Task
from split_device.serving.fields import ApiError, convert, present, supported
from split_device.serving.openai.messages import parse_messages

CompletionKind = Literal["chat", "text"]

#: The kinds of completion, by path.
COMPLETION_PATHS: dict[str, CompletionKind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}

#: `max_tokens` of a chat without a limit: generation ends with the model's positions.
UNLIMITED = 2**31 - 1

#: `max_tokens` of a text completion without a limit, as in OpenAI's API.
DEFAULT_TEXT_TOKENS = 16

#: Fields that are accepted and have no effect.
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})

#: Fields that are not supported, with the values at which they have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
}


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both kinds. `BOUNDS` has those of most numbers; temperatures end at 2, as in OpenAI's API."""

    model: str
    max_tokens: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: float | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Chat(_Body, frozen=True, kw_only=True):
    messages: tuple[Message, ...]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_completion_tokens: int | None = None
    #: Extensions of OpenAI's format, as vLLM has them: the answer continues the last message.
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    #: The same: values for variables of the chat template.
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises ApiError for fields that contradict each other."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.add_generation_prompt not in (None, not self.continue_final_message):
            raise ApiError(
                "add_generation_prompt must be the opposite of continue_final_message",
                param="add_generation_prompt",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ApiError(
                "continue_final_message needs a last message of the assistant", param="continue_final_message"
            )


class _Text(_Body, frozen=True, kw_only=True):
    prompt: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=1)]
    )
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


@dataclass(frozen=True)
class Query:
    """A request: one task for each choice of its answer."""

    kind: CompletionKind
    #: The model's name as the request has it.
    model: str
    tasks: tuple[Task, ...]
    stream: bool
    include_usage: bool
    #: The number of alternatives to report with each token; None for no log probabilities.
    logprobs: int | None
    #: Whether the answer continues the conversation's last message.
    continues: bool = False


def parse(
    kind: CompletionKind,
    body: object,
    model: ModelChoice,
    defaults: Sampling = Sampling(),
    template: ChatTemplate = ChatTemplate(),
) -> Query:
    """Parses a body into tasks for `model`, whatever model the body names.

    Args:
        defaults: the temperature, top_p and top_k of bodies that name none; None for those of the checkpoint.
        template: how conversations become prompts; values of a body's own come before its values.

    Raises:
        ApiError: the body is not a valid request.
    """
    fields = supported(body, _IGNORED, _NEUTRAL)
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = present(options)
    if kind == "chat":
        if "messages" in fields:
            fields["messages"] = parse_messages(fields["messages"])
        chat = convert(fields, _Chat)
        chat.check()
        limit = chat.max_completion_tokens or chat.max_tokens or UNLIMITED
        logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
        query = _query(kind, chat, chat.messages, limit, logprobs, model, defaults)
        own = template.with_kwargs(chat.chat_template_kwargs).unless_default()
        tasks = tuple(msgspec.structs.replace(task, chat_template=own) for task in query.tasks)
        return dataclasses.replace(query, tasks=tasks, continues=chat.continue_final_message)
    text = convert(fields, _Text)
    prompt = text.prompt if isinstance(text.prompt, str) else text.prompt[0]
    return _query(kind, text, prompt, text.max_tokens or DEFAULT_TEXT_TOKENS, text.logprobs, model, defaults)


def _query(
    kind: CompletionKind,
    body: _Body,
    prompt: str | tuple[Message, ...],
    max_tokens: int,
    logprobs: int | None,
    model: ModelChoice,
    defaults: Sampling,
) -> Query:
    sampling = Sampling(max_tokens, body.temperature, body.top_p, None, body.seed).filled(defaults)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    tasks = tuple(
        Task(
            model=model,
            prompt=prompt,
            sampling=sampling
            if body.seed is None
            else dataclasses.replace(sampling, seed=nth_seed(body.seed, choice)),
            stop=stop,
        )
        for choice in range(body.n or 1)
    )
    options = body.stream_options or _StreamOptions()
    return Query(kind, body.model, tasks, bool(body.stream), options.include_usage, logprobs)
