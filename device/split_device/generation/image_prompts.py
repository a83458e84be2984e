"""Prompts with images: what a checkpoint's processor makes of them for `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch
from transformers import AutoProcessor

from split_common.errors import ConfigError, UnknownModel
from split_device.generation.chat_template import RENDER_SECONDS, ChatTemplate
from split_device.generation.shown_images import ShownImage
from split_device.generation.time_limit import within
from split_device.generation.tokenizing import ChatMessage, check_messages
from split_device.generation.tool_prompts import shown_tools, spelled_out
from split_device.generation.tools import ToolUse


class ImagePrompt(list[int]):
    """Token ids of a prompt with images, and what the processor made of the images.

    Args:
        tokens: the ids.
        images: further arguments of `generate`, of one row.
    """

    def __init__(self, tokens: Sequence[int], images: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tokens)
        self.images = images


def load_processor(name_or_path: str, revision: str | None = None) -> Any:
    """Loads the processor that lies beside a checkpoint, without running Python code of the checkpoint's own.

    Raises:
        UnknownModel: it cannot be loaded.
        ConfigError: it takes no images, because the model is one for texts.
    """
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise UnknownModel(
            f"the processor of {name_or_path}, which images need, cannot be loaded: {error}: put the model's "
            "processor_config.json or preprocessor_config.json, and its tokenizer, beside its weights"
        ) from None
    if getattr(processor, "image_processor", None) is None:
        raise ConfigError(f"{name_or_path} takes no images: it has a processor for texts alone")
    return processor


def encode_with_images(
    processor: Any,
    messages: Sequence[ChatMessage],
    images: Sequence[ShownImage],
    continues: bool = False,
    template: ChatTemplate = ChatTemplate(),
    tool_use: ToolUse | None = None,
) -> ImagePrompt:
    """The prompt of a conversation with images.

    Args:
        processor: made by `load_processor`.
        images: in order.
        continues: the last message is to be continued, so it is left open, and no answer is begun after it.
        template: another chat template, or values for its variables.
        tool_use: the tools that the model is shown. If the chat template knows none, they are spelled out.

    Raises:
        ConfigError: the processor or its chat template refuses the conversation, or does not read a variable that
            is set; or the conversation is not UTF-8.
    """
    check_messages(messages)
    template = with_processor(template, processor)
    template.check(processor.tokenizer)
    tools = shown_tools(tool_use)
    if template.reads_tools(processor.tokenizer):
        return _encoded(processor, messages, images, continues, template, tools)
    if not tools and not any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        return _encoded(processor, messages, images, continues, template)
    spelled = spelled_out(messages, tools)
    try:
        # The tools may be described in a new message before the others.
        moved = [replace(image, message=image.message + len(spelled) - len(messages)) for image in images]
        return _encoded(processor, spelled, moved, continues, template)
    except ConfigError:
        if len(spelled) == len(messages):
            raise
        # Some templates know no system message.
        return _encoded(processor, spelled_out(messages, tools, system=False), images, continues, template)


def with_processor(template: ChatTemplate, processor: Any) -> ChatTemplate:
    """The template by which a processor makes prompts: its own, which may be another one than the tokenizer's."""
    if template.text is None and isinstance(processor.chat_template, str):
        return msgspec.structs.replace(template, text=processor.chat_template)
    return template


def _encoded(
    processor: Any,
    messages: Sequence[ChatMessage],
    images: Sequence[ShownImage],
    continues: bool,
    template: ChatTemplate,
    tools: Sequence[Mapping[str, Any]] = (),
) -> ImagePrompt:
    conversation = [
        message | {"content": _parts(message["content"], [image for image in images if image.message == index])}
        for index, message in enumerate(messages)
    ]
    given = {
        "chat_template": template.text,
        "tools": list(tools) or None,
        "add_generation_prompt": not continues,
        "continue_final_message": continues,
        **template.effort_values(template.variables(processor.tokenizer)),
        **template.kwargs,
    }
    try:
        # The text alone first: how long images take is no matter of the template.
        within(RENDER_SECONDS, lambda: processor.apply_chat_template(conversation, tokenize=False, **given))
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", **given
        )
    # Templates and processors are code and settings of the checkpoint, each with errors of its own.
    except Exception as error:
        raise ConfigError(f"the model's processor refuses these images or this conversation: {error}") from None
    tensors = {name: tensor for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}
    tensors.pop("attention_mask", None)
    return ImagePrompt(tensors.pop("input_ids")[0].tolist(), tensors)


def _parts(text: str, images: Sequence[ShownImage]) -> list[dict[str, Any]]:
    """A message's text and images as the parts of its content."""
    parts: list[dict[str, Any]] = []
    begin = 0
    for image in images:
        if before := text[begin : image.at]:
            parts.append({"type": "text", "text": before})
        parts.append({"type": "image", "image": image.image})
        begin = image.at
    if begin < len(text) or not parts:
        parts.append({"type": "text", "text": text[begin:]})
    return parts
