"""Prompts with images: what a checkpoint's processor makes of them for `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoProcessor

from split_common.errors import ConfigError, UnknownModel
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.tokenizing import ChatMessage, check_messages


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
    processor: Any, messages: Sequence[ChatMessage], images: Sequence[Any], template: ChatTemplate = ChatTemplate()
) -> dict[str, torch.Tensor]:
    """Inputs of `generate`, of one row, for a conversation whose last message has images before its text.

    Args:
        processor: made by `load_processor`.
        images: of Pillow, in RGB.
        template: another chat template, or values for its variables.

    Raises:
        ConfigError: the processor or its chat template refuses the conversation, or it is not UTF-8.
    """
    check_messages(messages)
    parts: list[list[dict[str, Any]]] = [[{"type": "text", "text": message["content"]}] for message in messages]
    parts[-1] = [*({"type": "image", "image": image} for image in images), *parts[-1]]
    conversation = [
        {"role": message["role"], "content": part} for message, part in zip(messages, parts, strict=True)
    ]
    try:
        inputs = processor.apply_chat_template(
            conversation,
            chat_template=template.text,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **template.kwargs,
        )
    # Templates and processors are code and settings of the checkpoint, each with errors of its own.
    except Exception as error:
        raise ConfigError(f"the model's processor refuses these images or this conversation: {error}") from None
    return {name: tensor for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}
