"""What the bodies of both kinds of completions have in common."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from split_device.generation.settings import Sampling, nth_seed
from split_device.jobs.job import Task
from split_device.serving.fields import present, supported

#: Fields that are accepted and have no effect.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})

#: Fields that are not supported, with the values at which they have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
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


class StreamOptions(msgspec.Struct, frozen=True):
    """Of a streamed answer."""

    include_usage: bool = False


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both kinds. `BOUNDS` has those of most numbers; temperatures end at 2, as in OpenAI's API."""

    model: str
    max_tokens: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: float | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, max_tokens: int, defaults: Sampling) -> Sampling:
        """How tokens are chosen.

        Args:
            max_tokens: the most tokens of the answer.
            defaults: settings of bodies that name none.
        """
        return Sampling(max_tokens, self.temperature, self.top_p, None, self.seed).filled(defaults)

    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


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
