"""`lambda-split chat`: a conversation in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption
from split_common.errors import ConfigError, SplitError
from split_common.models.checkpoint_files import model_name
from split_common.system.console import emit_json, piped_lines, stderr
from split_common.system.files import user_path
from split_common.system.process import passive_threads
from split_common.system.text import check_text
from split_device.cli.answer_format import AnswerFormatOptions
from split_device.cli.checks import check_connection
from split_device.cli.groups import (
    AnswerLimits,
    ConnectionOptions,
    HardwareOptions,
    PromptFormatOptions,
    SamplingOptions,
    TextModelOptions,
)
from split_device.cli.options import RequestIdOption, StopOption, SystemOption
from split_device.cli.terminal import answer_lines, loading, waiting_for_workers
from split_device.generation.limits import ONE_ANSWER
from split_device.jobs.job import Message, MessageImage
from split_device.jobs.message_images import image_content

#: How a line begins that shows an image.
_SHOW = "/show "


@grouped
def chat(
    model: TextModelOptions,
    connection: ConnectionOptions,
    hardware: HardwareOptions,
    sampling: SamplingOptions,
    prompt_format: PromptFormatOptions,
    answer_format: AnswerFormatOptions,
    limits: AnswerLimits = ONE_ANSWER,
    stop: StopOption = None,
    system: SystemOption = None,
    request_id: RequestIdOption = None,
    json: JsonOption = False,
) -> None:
    """Talk with a split model; each turn sends only what is new.

    One line is one turn. /show FILE shows an image with the next turn; /reset forgets the conversation; /quit or
    Ctrl-D ends it. In a terminal, Ctrl-C stops an answer. What the model thinks before it answers goes to stderr.
    With --json, the turns are printed at the end as one object.
    """
    sampling = sampling.checked()
    passive_threads()
    check_connection(connection)
    choice, template, structured = model.choice(), prompt_format.template(), answer_format.structured()

    with contextlib.ExitStack() as stack:
        with loading(connection, choice.name):
            from split_device.generation.tokenizing import load_tokenizer
            from split_device.jobs.chat import Conversation
            from split_device.jobs.models import find_processor, loaded_model

            tokenizer = load_tokenizer(*choice.tokenizer_place)
            template.check(tokenizer)
            processor = find_processor(choice)
            place = waiting_for_workers(connection), limits, hardware
            loaded = stack.enter_context(loaded_model(choice, *place, tokenizer, processor))
        start = (Message("system", system),) if system else ()
        conversation = Conversation(loaded, choice, start, template, request_id)
        images: list[MessageImage] = []
        turns = []
        one_turn = _continuing if sys.stdin.isatty() else contextlib.nullcontext
        for line in _lines(shows=processor is not None):
            if line == "/reset":
                conversation.reset()
                images = []
            elif line.startswith(_SHOW):
                with one_turn():
                    images.append(_image(line.removeprefix(_SHOW).strip(), choice.name, processor))
            elif line:
                with one_turn(), answer_lines(json) as (on_text, think):
                    answer = conversation.say(line, sampling, on_text, stop or (), images, structured, think)
                    images = []
                    turns.append({"prompt": line} | dataclasses.asdict(answer))
        if json:
            emit_json({"turns": turns, "traffic": loaded.model.traffic})


def _image(file: str, model: str, processor: Any) -> MessageImage:
    """The image in a file. Raises ConfigError if the model takes none, or the file cannot be read as one."""
    if processor is None:
        raise ConfigError(f"{model_name(model)} takes no images: it is a model for texts")
    return image_content(user_path(file), file)


@contextlib.contextmanager
def _continuing() -> Iterator[None]:
    """An error or Ctrl-C ends the turn, not the conversation."""
    try:
        yield
    except SplitError as error:
        stderr.print(f"error: {error}", soft_wrap=True)
    except KeyboardInterrupt:
        stderr.print("stopped; the turn is forgotten")


def _lines(shows: bool) -> Iterator[str]:
    """What the user says, up to /quit or the end. In a terminal, first says what may be typed.

    Args:
        shows: whether images can be shown.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        show = "/show FILE shows an image with the next turn; " if shows else ""
        stderr.print(f"{show}/reset forgets the conversation; /quit or Ctrl-D ends it")
    for line in _typed_lines() if interactive else piped_lines():
        if line == "/quit":
            return
        yield line


def _typed_lines() -> Iterator[str]:
    """The lines that the user types, up to Ctrl-D. Raises ConfigError for a line that is not text."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise ConfigError("the line is not in the terminal's encoding") from None
        yield check_text(line, "the line").strip()
