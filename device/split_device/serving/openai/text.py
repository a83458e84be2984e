"""Requests for text completions."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta

from split_device.generation.settings import Sampling
from split_device.jobs.job import ModelChoice, Task
from split_device.serving.fields import ApiError, convert, treated
from split_device.serving.openai.bodies import IGNORED, MAX_CHOICES, NEUTRAL, Body, choices, fields_of
from split_device.serving.openai.query import CompletionForm, CompletionQuery
from split_device.serving.openai.structured import FIELDS as STRUCTURED_FIELDS
from split_device.serving.openai.structured import take_structured

#: `max_tokens` of a text completion without a limit, as in OpenAI's API.
DEFAULT_TOKENS = 16

#: What a prompt may be.
_Prompt = Annotated[str, Meta(min_length=1)] | Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]


class TextBody(Body, frozen=True, kw_only=True):
    """A request's body."""

    prompt: Any
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None

    def check(self) -> None:
        """Raises ApiError for fields that contradict each other."""
        self.check_stream()
        if self.best_of is None:
            return
        if self.best_of < (self.n or 1):
            raise ApiError("best_of must be at least n", param="best_of")
        if self.stream and self.best_of > (self.n or 1):
            raise ApiError("best_of is chosen from whole answers: it cannot be streamed", param="best_of")


#: What is done with each field.
FIELDS = treated({*TextBody.__struct_fields__, *STRUCTURED_FIELDS}, IGNORED, NEUTRAL)


def parse_text(body: object, model: ModelChoice, defaults: Sampling) -> CompletionQuery:
    """Parses a body into tasks. Arguments and errors are those of `requests.parse`."""
    fields = fields_of(body)
    structured = take_structured(fields)
    prompt_alone = _takes_no_tokens(fields)
    text = convert(fields, TextBody)
    text.check()
    prompts = _prompts(text.prompt)
    count = text.best_of or text.n or 1
    if len(prompts) * count > MAX_CHOICES:
        raise ApiError(f"{len(prompts)} prompts with {count} choices are more than {MAX_CHOICES}", param="prompt")
    form = CompletionForm(
        kind="text",
        per_prompt=count,
        kept=text.n or 1,
        logprobs=text.logprobs,
        prompt_logprobs=text.prompt_logprobs,
        echo=bool(text.echo),
        prompt_alone=prompt_alone,
    )
    scores = _scores(form)
    sampling, stop = text.sampling(text.max_tokens or DEFAULT_TOKENS, defaults), text.stop_texts()
    tasks = [
        Task(
            model=model,
            prompt=prompt if isinstance(prompt, str) else "",
            prompt_token_ids=UNSET if isinstance(prompt, str) else prompt,
            sampling=sampling,
            stop=stop,
            structured=structured,
            **scores,
        )
        for prompt in prompts
    ]
    return CompletionQuery(
        model=text.model,
        tasks=tuple(each for task in tasks for each in choices(task, count)),
        stream=bool(text.stream),
        form=form,
        usage_in=text.usage_in(),
    )


def _scores(form: CompletionForm) -> dict[str, Any]:
    """The fields of a task that say what is told of tokens."""
    # The best ones are chosen by their log probabilities.
    logprobs = 0 if form.logprobs is None and form.kept < form.per_prompt else form.logprobs
    asked = [form.prompt_logprobs, form.logprobs if form.echo else None]
    prompt = max((count for count in asked if count is not None), default=None)
    return {
        "logprobs": UNSET if logprobs is None else logprobs,
        "prompt_logprobs": UNSET if prompt is None else prompt,
        "echo": form.echo or UNSET,
    }


def _takes_no_tokens(fields: dict[str, Any]) -> bool:
    """Whether a body asks for its prompt alone, which takes one token that is not shown. Raises ApiError."""
    limit = fields.get("max_tokens")
    if limit != 0 or isinstance(limit, bool):
        return False
    if fields.get("echo") is not True:
        raise ApiError("max_tokens: 0 leaves nothing to answer without echo: true", param="max_tokens")
    fields["max_tokens"] = 1
    return True


def _prompts(given: Any) -> list[str | tuple[int, ...]]:
    """The prompts of a body: texts or token ids, one or a list of them. Raises ApiError that names a wrong one."""
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int | float)
    if not several:
        return [_prompt(given, "prompt")]
    if len(given) > MAX_CHOICES:
        raise ApiError(f"prompt: {len(given)} prompts are more than {MAX_CHOICES}", param="prompt")
    return [_prompt(each, f"prompt[{index}]") for index, each in enumerate(given)]


def _prompt(given: Any, where: str) -> str | tuple[int, ...]:
    try:
        prompt: str | tuple[int, ...] = msgspec.convert(given, _Prompt)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        path = where + at.rstrip("`")
        raise ApiError(f"{path}: {message}", param=path) from None
    return prompt
