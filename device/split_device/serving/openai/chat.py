"""Requests for chat completions."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from split_device.generation.chat_template import ChatTemplate
from split_device.generation.settings import Sampling
from split_device.generation.tools import ToolUse
from split_device.jobs.job import Message, ModelChoice, Task
from split_device.serving.fields import ApiError, convert, treated
from split_device.serving.openai.bodies import IGNORED, NEUTRAL, Body, choices, fields_of
from split_device.serving.openai.messages import parse_messages
from split_device.serving.openai.query import CompletionForm, CompletionQuery
from split_device.serving.openai.structured import FIELDS as STRUCTURED_FIELDS
from split_device.serving.openai.structured import take_structured
from split_device.serving.openai.tools import FIELDS as TOOL_FIELDS
from split_device.serving.openai.tools import take_tools

#: `max_tokens` of a chat without a limit: generation ends with the model's positions.
UNLIMITED = 2**31 - 1


class ChatBody(Body, frozen=True, kw_only=True):
    """A request's body."""

    messages: tuple[Message, ...]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_completion_tokens: int | None = None
    #: Extensions of OpenAI's format, as vLLM has them: whether the answer continues the last message. If neither is
    #: said it does, as in llama.cpp's server, where that is a text of the assistant.
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    #: The same: values for variables of the chat template.
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    #: What `take_tools` made of the fields about tools.
    tool_use: ToolUse | UnsetType = UNSET

    def check(self) -> None:
        """Raises ApiError for fields that contradict each other."""
        self.check_stream()
        if self.prompt_logprobs is not None and any(message.images for message in self.messages):
            raise ApiError(
                "prompt_logprobs are not available for prompts with images",
                param="prompt_logprobs",
                code="unsupported_parameter",
            )
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.add_generation_prompt is not None and self.add_generation_prompt == self.continues:
            raise ApiError(
                "add_generation_prompt must be the opposite of continue_final_message",
                param="add_generation_prompt",
            )
        if self.continues and self.messages[-1].role != "assistant":
            raise ApiError(
                "continue_final_message needs a last message of the assistant", param="continue_final_message"
            )

    @property
    def continues(self) -> bool:
        """Whether the answer goes on where the last message ends."""
        if self.continue_final_message is not None:
            return self.continue_final_message
        last = self.messages[-1]
        begun = last.role == "assistant" and bool(last.content) and not last.tool_calls
        return begun and self.add_generation_prompt is not True


#: What is done with each field.
FIELDS = treated({*ChatBody.__struct_fields__, *TOOL_FIELDS, *STRUCTURED_FIELDS} - {"tool_use"}, IGNORED, NEUTRAL)


def parse_chat(body: object, model: ModelChoice, defaults: Sampling, template: ChatTemplate) -> CompletionQuery:
    """Parses a body into tasks. Arguments and errors are those of `requests.parse`."""
    fields = take_tools(fields_of(body))
    structured = take_structured(fields)
    if "messages" in fields:
        fields["messages"] = parse_messages(fields["messages"])
    chat = convert(fields, ChatBody)
    chat.check()
    limit = chat.max_completion_tokens or chat.max_tokens or UNLIMITED
    own = template.with_kwargs(chat.chat_template_kwargs).with_reasoning_effort(chat.reasoning_effort)
    task = Task(
        model=model,
        prompt=chat.messages,
        sampling=chat.sampling(limit, defaults),
        stop=chat.stop_texts(),
        chat_template=own.unless_default(),
        tool_use=chat.tool_use,
        continue_final_message=chat.continues or UNSET,
        structured=structured,
    )
    logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
    if logprobs is not None:
        task = msgspec.structs.replace(task, logprobs=logprobs)
    first, *others = choices(task, chat.n or 1)
    if chat.prompt_logprobs is not None:
        # The choices have one prompt.
        first = msgspec.structs.replace(first, prompt_logprobs=chat.prompt_logprobs)
    count = 1 + len(others)
    return CompletionQuery(
        model=chat.model,
        tasks=(first, *others),
        stream=bool(chat.stream),
        form=CompletionForm(
            kind="chat", per_prompt=count, kept=count, logprobs=logprobs, prompt_logprobs=chat.prompt_logprobs
        ),
        usage_in=chat.usage_in(),
    )
