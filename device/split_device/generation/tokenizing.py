"""Loads tokenizers, and makes token ids of texts and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoTokenizer

from split_common.errors import ConfigError, PromptTooLong, UnknownModel, UnsupportedArchitecture
from split_common.models.checkpoint import Checkpoint
from split_common.models.checkpoint_files import check_tokenizer_files
from split_common.models.loading import config_error
from split_common.system.files import user_path
from split_common.system.text import check_text
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.tool_prompts import shown_tools, spelled_out
from split_device.generation.tools import ToolUse

#: A message of a conversation: its `role` and its `content`. Those of tools and with calls have more, as
#: transformers documents it.
ChatMessage = dict[str, Any]

#: A text of more characters than so many for each token that fits is looked at in parts.
CHARACTERS = 8

#: By how many tokens a part of a text may have more than the whole.
SPARE = 1024


def load_tokenizer(name_or_path: str, revision: str | None = None) -> Any:
    """Loads the checkpoint's tokenizer, without running Python code of the checkpoint's own.

    Raises:
        UnknownModel: there is none, or it cannot be loaded.
        UnsupportedArchitecture: it is code of the checkpoint's own.
        ModelError: one of its files cannot be read, or is a Git LFS pointer.
    """
    directory = user_path(name_or_path)
    # A tokenizer may lie where no weights do.
    files = directory if directory.is_dir() else Checkpoint.resolve(name_or_path, revision)
    if isinstance(files, Path):
        if not [*directory.glob("tokenizer*"), *directory.glob("vocab*")]:
            raise UnknownModel(
                f"{name_or_path} has no tokenizer: put the model's tokenizer.json beside its weights"
            )
        check_tokenizer_files(directory)
    place = files if isinstance(files, Path) else files.name
    try:
        if isinstance(files, Checkpoint) and (gguf := files.gguf) is not None:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
        # Some of its settings, such as model_max_length, are not looked at before the first text.
        tokenizer("")
        return tokenizer
    except Exception as error:
        if _brings_code(files):
            raise UnsupportedArchitecture(
                f"the tokenizer of {name_or_path} is Python code of its own (auto_map in tokenizer_config.json), "
                "which is not run"
            ) from None
        # A tokenizer is chosen by the model's type.
        has_config = (files / "config.json").is_file() if isinstance(files, Path) else files.gguf is None
        if has_config and (reason := config_error(place, revision)) is not None:
            raise UnknownModel(f"{name_or_path}: config.json is wrong: {reason}") from None
        raise UnknownModel(f"the tokenizer of {name_or_path} cannot be loaded: {error}") from None


def _brings_code(files: Checkpoint | Path) -> bool:
    """Whether a checkpoint, or a directory, names code of its own as its tokenizer."""
    name = "tokenizer_config.json"
    file = files / name if isinstance(files, Path) else files.find(name)
    try:
        return file is not None and bool(msgspec.json.decode(file.read_bytes(), type=_TokenizerConfig).auto_map)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


class _TokenizerConfig(msgspec.Struct):
    auto_map: Any = None


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raises ConfigError if the text of a message is not UTF-8."""
    for index, message in enumerate(messages):
        check_text(message["content"], f"messages[{index}].content")


def check_length(tokenizer: Any, text: str, limit: int) -> None:
    """Refuses a text that has far more tokens than fit, without encoding all of it, which may take a minute.

    Raises:
        PromptTooLong: a part of the text has many more tokens than `limit`.
    """
    length = CHARACTERS * limit + SPARE
    while length < len(text):
        if len(tokenizer(text[:length])["input_ids"]) > limit + SPARE:
            raise PromptTooLong(f"more than {limit} tokens leave no room in the model's {limit} positions")
        length *= 4


def encode_chat(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    continues: bool = False,
    template: ChatTemplate = ChatTemplate(),
    tool_use: ToolUse | None = None,
    limit: int | None = None,
) -> torch.Tensor:
    """Token ids int64 `[1, tokens]` of a conversation; of its plain text if the tokenizer has no chat template.

    Args:
        continues: the last message is to be continued, so it is left open, and no answer is begun after it.
        template: another chat template, or values for its variables.
        tool_use: the tools that the model is shown. If the chat template knows none, they are spelled out.
        limit: how many tokens fit; None to encode however many there are.

    Raises:
        PromptTooLong: as `check_length`.
        ConfigError: the chat template refuses the conversation, is not one, or does not read a variable that is
            set; or the conversation is not UTF-8.
    """
    check_messages(messages)
    template.check(tokenizer)
    tools = shown_tools(tool_use)
    if template.text is None and not tokenizer.chat_template:
        plain = "\n".join(message["content"] for message in spelled_out(messages, tools))
        return encode_text(tokenizer, plain, limit)
    if template.reads_tools(tokenizer):
        text = template.render(tokenizer, messages, continues, tools)
    else:
        text = _render_plain(tokenizer, messages, continues, template, tools)
    if limit is not None:
        check_length(tokenizer, text, limit)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return ids


def _render_plain(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    continues: bool,
    template: ChatTemplate,
    tools: list[dict[str, Any]],
) -> str:
    """The text of a conversation by a chat template that knows no tools. Some know no system message either."""
    try:
        return template.render(tokenizer, spelled_out(messages, tools), continues)
    except RecursionError:
        raise ConfigError("tools: they are nested too deeply") from None
    except ConfigError:
        if not tools or messages[0]["role"] == "system":
            raise
        return template.render(tokenizer, spelled_out(messages, tools, system=False), continues)


def encode_text(tokenizer: Any, text: str, limit: int | None = None) -> torch.Tensor:
    """Token ids int64 `[1, tokens]` of plain text.

    Args:
        limit: how many tokens fit; None to encode however many there are.

    Raises:
        PromptTooLong: as `check_length`.
        ConfigError: the text is not UTF-8.
    """
    check_text(text, "the prompt")
    if limit is not None:
        check_length(tokenizer, text, limit)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
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
