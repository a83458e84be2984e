"""Loads tokenizers, and makes token ids of texts and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from split_common.errors import ConfigError, UnknownModel
from split_common.models.checkpoint import Checkpoint
from split_common.system.text import check_text

#: A message of a conversation: its `role` and its `content`.
ChatMessage = dict[str, str]


def load_tokenizer(name_or_path: str, revision: str | None = None) -> Any:
    """Loads the checkpoint's tokenizer. Raises UnknownModel if it has none, or it cannot be loaded."""
    checkpoint = Checkpoint.resolve(name_or_path, revision)
    directory = Path(name_or_path)
    if directory.is_dir() and not [*directory.glob("tokenizer*"), *directory.glob("vocab*")]:
        raise UnknownModel(f"{name_or_path} has no tokenizer: put the model's tokenizer.json beside its weights")
    try:
        return AutoTokenizer.from_pretrained(checkpoint.name if revision else name_or_path, revision=revision)
    except Exception as error:
        raise UnknownModel(f"the tokenizer of {name_or_path} cannot be loaded: {error}") from None


def encode_chat(tokenizer: Any, messages: Sequence[ChatMessage]) -> torch.Tensor:
    """Token ids int64 `[1, tokens]` of a conversation; of its plain text if the tokenizer has no chat template.

    Raises:
        ConfigError: the chat template refuses the conversation, or it is not UTF-8.
    """
    for index, message in enumerate(messages):
        check_text(message["content"], f"messages[{index}].content")
    if not tokenizer.chat_template:
        return encode_text(tokenizer, "\n".join(message["content"] for message in messages))
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # The template is a program in the checkpoint. Some refuse system messages, for example.
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from None
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return ids


def encode_text(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids int64 `[1, tokens]` of plain text. Raises ConfigError if it is not UTF-8."""
    ids: torch.Tensor = tokenizer(check_text(text, "the prompt"), return_tensors="pt")["input_ids"]
    return ids


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a text: those of the model's generation configuration, and the tokenizer's end token.

    Some fine-tuned checkpoints end their turns with the tokenizer's, but still have the base model's configuration.
    """
    ids = model.generation_config.eos_token_id
    own = set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return own | ({int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set())


def pad_token(tokenizer: Any) -> int:
    """The tokenizer's padding token id, else that of its end token, else 0."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)
