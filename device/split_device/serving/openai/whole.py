"""Whole completions: which choices are kept, and what is told of their tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from split_device.serving.choices import Choice, TokenLogprobs
from split_device.serving.openai.answers import NAMES, Header, chat_choice
from split_device.serving.openai.query import CompletionForm
from split_device.serving.openai.text_answers import TextChoice, likeliest
from split_device.serving.openai.usage import Usage

#: Makes the piece that repeats a prompt.
Prompt = Callable[[], Choice]


def completion(
    header: Header, form: CompletionForm, usage: Usage, choices: Sequence[Choice], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """A whole response in OpenAI's format.

    Args:
        choices: one for each task of the request, in their order.
        prompts: one for each choice.
    """
    fields = header.fields(NAMES[form.kind][1])
    if form.kind == "text":
        kept = enumerate(_kept(form, choices))
        written = [_text(form, index, choices[number], prompts[number]) for index, number in kept]
        return fields | {"choices": written, "usage": usage.fields()}
    fields |= {"choices": [chat_choice(*each) for each in enumerate(choices)], "usage": usage.fields()}
    return fields | (_of_prompt(prompts[0](), form.prompt_logprobs) if form.prompt_logprobs is not None else {})


def _kept(form: CompletionForm, choices: Sequence[Choice]) -> list[int]:
    """Which choices are answers: of each prompt the likeliest, if it has more than are kept."""
    if form.kept == form.per_prompt:
        return [*range(len(choices))]
    return [
        first + place
        for first in range(0, len(choices), form.per_prompt)
        for place in likeliest(choices[first : first + form.per_prompt], form.kept)
    ]


def _text(form: CompletionForm, index: int, choice: Choice, prompt: Prompt) -> dict[str, Any]:
    if form.logprobs is None:
        # The best ones are chosen by log probabilities that nobody has asked for.
        choice = dataclasses.replace(choice, logprobs=None)
    if not form.echo and form.prompt_logprobs is None:
        return TextChoice(index).fields(choice)
    piece = prompt()
    echoed = dataclasses.replace(piece, logprobs=_cut(piece.logprobs, form.logprobs or 0))
    text = TextChoice(index, (lambda: echoed) if form.echo else None, prompt_alone=form.prompt_alone)
    fields = text.fields(choice)
    return fields | (_of_prompt(piece, form.prompt_logprobs) if form.prompt_logprobs is not None else {})


def _cut(tokens: list[TokenLogprobs] | None, count: int) -> list[TokenLogprobs] | None:
    """Log probabilities with fewer alternatives."""
    if tokens is None:
        return None
    return [msgspec.structs.replace(token, top=token.top[:count]) for token in tokens]


def _of_prompt(prompt: Choice, count: int) -> dict[str, Any]:
    """vLLM's field: for each token of the prompt the token and the likeliest ones, by their ids."""
    return {"prompt_logprobs": [_by_id(token) for token in _cut(prompt.logprobs, count) or ()]}


def _by_id(token: TokenLogprobs) -> dict[str, Any] | None:
    if token.logprob is None:
        return None
    return {
        str(each.id): {"logprob": each.logprob, "rank": each.rank, "decoded_token": each.text}
        for each in (token, *token.top)
    }
