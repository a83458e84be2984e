"""What the bodies of both kinds of completions have in common."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from split_device.generation.settings import check_stop, nth_seed
from split_device.jobs.job import Task
from split_device.serving.fields import ApiError, present, supported
from split_device.serving.openai.query import UsageIn
from split_device.serving.openai.sampling_fields import SamplingFields

#: Fields that are accepted and have no effect.
IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)

#: Fields that are not supported, with the values at which they have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
}


#: Most choices of a request, of all its prompts together.
MAX_CHOICES = 128


class StreamOptions(msgspec.Struct, frozen=True):
    """Of a streamed answer."""

    include_usage: bool = False
    #: With `include_usage`: whether each chunk counts the tokens so far. An extension, as vLLM has it.
    continuous_usage_stats: bool = False
    #: Has no effect: nothing is added to events to hide how long they are.
    include_obfuscation: bool | None = None


class Body(SamplingFields, frozen=True, kw_only=True):
    """Fields of both kinds."""

    model: str
    max_tokens: int | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    #: An extension of OpenAI's format, as vLLM has it. `BOUNDS` has its bounds.
    prompt_logprobs: int | None = None

    def check_stream(self) -> None:
        """Raises ApiError for what cannot be streamed."""
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(
                "prompt_logprobs are part of whole answers: they cannot be streamed", param="prompt_logprobs"
            )

    def stop_texts(self) -> tuple[str, ...]:
        """Texts at which the answer ends. Raises ConfigError for too many characters."""
        return check_stop((self.stop,) if isinstance(self.stop, str) else self.stop or ())

    def usage_in(self) -> UsageIn:
        """Which chunks of a stream count tokens."""
        if self.stream_options is None or not self.stream_options.include_usage:
            return "none"
        return "all" if self.stream_options.continuous_usage_stats else "last"


def fields_of(body: object) -> dict[str, Any]:
    """The fields of a body that have an effect. Raises ApiError."""
    fields = supported(body, IGNORED, NEUTRAL)
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = present(options)
    return fields


def choices(task: Task, count: int) -> tuple[Task, ...]:
    """Tasks that are one but for their seeds, one for each choice of an answer."""
    seed = task.seed
    if seed is None:
        return (task,) * count
    return tuple(
        msgspec.structs.replace(task, sampling=dataclasses.replace(task.sampling, seed=nth_seed(seed, index)))
        for index in range(count)
    )
