"""Answers as they are generated: from tokens to what is said, what was thought, and which tools are called."""

from __future__ import annotations

import copy
import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from split_common.errors import ConfigError
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.detokenize import TextStream
from split_device.generation.special_tokens import special_tokens
from split_device.generation.tool_calls import AnswerParser, AnswerPiece
from split_device.generation.tool_styles import (
    GENERAL,
    CallForm,
    call_style,
    form_of,
    open_thinking,
    response_template,
)
from split_device.generation.tools import ToolUse

#: How many tokens at a prompt's end may belong to the answer, if the template has no anchor of its own.
_OPENING = 16


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers of a model are read. `answer_format` makes it."""

    #: A response template, as transformers documents it; None if answers are text and nothing else.
    template: dict[str, Any] | None
    #: How a call is written if it is forced.
    form: CallForm
    tool_use: ToolUse | None = None
    #: Whether the response template is the tokenizer's own, which wants to see the whole prompt.
    own: bool = False
    #: Whether ids of calls have nine letters and digits, because the chat template refuses others.
    short_ids: bool = False

    def visible(self, tokenizer: Any) -> list[int]:
        """The special tokens that the response template looks for."""
        texts = list(_texts(self.template))
        return [
            id_
            for id_, token in special_tokens(tokenizer).items()
            if any(token in text or re.escape(token) in text for text in texts)
        ]

    def prefix(self, tokenizer: Any, prompt: Sequence[int]) -> str:
        """What the response template has to see of a prompt."""
        if self.own:
            return str(tokenizer.decode(prompt))
        thinking = open_thinking(str(tokenizer.decode(prompt[-_OPENING:])))
        return "" if thinking is None else thinking[0]

    def call_id(self, answer: str, index: int) -> str:
        """The id of a call.

        Args:
            answer: a name of the answer.
            index: which of the answer's calls it is, from 0.
        """
        digest = hashlib.sha256(f"{answer}/{index}".encode()).hexdigest()
        return digest[:9] if self.short_ids else f"call_{digest[:24]}"


def answer_format(tokenizer: Any, template: ChatTemplate, tool_use: ToolUse | None = None) -> AnswerFormat:
    """How a model's answers to conversations are read, as its tokenizer or its chat template say.

    Args:
        template: how conversations become prompts.
        tool_use: the tools of the request; None for none.

    Raises:
        ConfigError: the chat template is not one.
    """
    reads_tools = template.reads_tools(tokenizer)
    text = template.source(tokenizer, tools=reads_tools and tool_use is not None)
    calls = tool_use is not None and bool(tool_use.callable)
    forced = tool_use is not None and tool_use.forced
    style = call_style(text, reads_tools)
    if forced and style.form is None:
        style = GENERAL
    form = style.form or GENERAL.form
    assert form is not None
    own = template.text is None and isinstance(getattr(tokenizer, "response_template", None), dict)
    found = response_template(text, style if calls else None)
    if own:
        found = copy.deepcopy(tokenizer.response_template)
        theirs = found["fields"].pop("tool_calls", style.calls)
        if forced:
            form = form_of(theirs) or form
            theirs = theirs if form_of(theirs) else style.calls
        if calls:
            found["fields"]["tool_calls"] = theirs
    return AnswerFormat(found, form, tool_use, own, "length 9" in text)


class AnswerStream:
    """An answer, from its tokens.

    Args:
        tokenizer: of transformers.
        format_: how it is read; None for an answer that is text and nothing else.
        prompt: the prompt's token ids.
        stop: texts at which the answer ends.
        before: the last of the prompt's tokens, if the answer continues its text.
        name: a name of the answer, of which ids of calls are made; None for random ones.

    Raises:
        ConfigError: the tokenizer's response template is invalid.
    """

    def __init__(
        self,
        tokenizer: Any,
        format_: AnswerFormat | None,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
        name: str | None = None,
    ) -> None:
        self._parser: AnswerParser | None = None
        visible: list[int] = []
        if format_ is not None and format_.template is not None:
            visible = format_.visible(tokenizer)
            tool_use, answer = format_.tool_use, name or secrets.token_hex(16)
            try:
                self._parser = AnswerParser(
                    format_.template,
                    format_.prefix(tokenizer, prompt),
                    () if tool_use is None else tool_use.callable,
                    tool_use is None or tool_use.parallel,
                    lambda index: format_.call_id(answer, index),
                )
            except ValueError as error:
                raise ConfigError(f"the tokenizer's response template is invalid: {error}") from None
        self._text = TextStream(tokenizer, stop, before, visible)
        #: Number of tokens in which the model thought, those that begin and end it included.
        self.reasoning_tokens = 0
        #: Number of tokens that have been held back: they may begin thinking.
        self._silent = 0

    @property
    def stopped(self) -> bool:
        """Whether the answer has ended: a stop string has come, or the only call."""
        return self._text.stopped or (self._parser is not None and self._parser.done)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has come."""
        return self._text.stopped_by

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._parser is not None and self._parser.called

    def push(self, token: int) -> AnswerPiece:
        """Adds a token. Returns what it completes, which may be nothing."""
        text = self._text.push(token)
        if self._parser is None:
            return AnswerPiece(text)
        thought = self._parser.thinks
        piece = self._parser.push(text)
        if thought or self._parser.thinks or piece.reasoning:
            self.reasoning_tokens += 1 + self._silent
        self._silent = 0 if piece or self._parser.thinks else self._silent + 1
        return piece

    def end(self) -> AnswerPiece:
        """Ends the answer. Returns what was held back."""
        text = self._text.end()
        if self._parser is None:
            return AnswerPiece(text)
        return self._parser.push(text) + self._parser.end()


def _texts(value: Any) -> Iterator[str]:
    """All texts of a response template."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
