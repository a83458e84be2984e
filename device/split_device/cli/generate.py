"""`lambda-split generate`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import typer

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption
from split_common.system.console import emit_json, read_stdin, stderr
from split_common.system.files import user_path
from split_common.system.process import passive_threads
from split_device.cli.answer_format import AnswerFormatOptions
from split_device.cli.checks import check_connection, check_prompt, check_raw
from split_device.cli.groups import (
    ConnectionOptions,
    HardwareOptions,
    PromptFormatOptions,
    SamplingOptions,
    TextModelOptions,
)
from split_device.cli.options import (
    PromptArgument,
    RawOption,
    RequestIdOption,
    ShowOption,
    StopOption,
    SystemOption,
)
from split_device.cli.tables import timings_table
from split_device.cli.terminal import answer_lines, loading, waiting_for_workers
from split_device.images.files import read_prompt_image


@grouped
def generate(
    prompt: PromptArgument,
    model: TextModelOptions,
    connection: ConnectionOptions,
    hardware: HardwareOptions,
    sampling: SamplingOptions,
    prompt_format: PromptFormatOptions,
    answer_format: AnswerFormatOptions,
    stop: StopOption = None,
    system: SystemOption = None,
    raw: RawOption = False,
    show: ShowOption = None,
    timings: Annotated[
        bool,
        typer.Option("--timings", help="Print on stderr how long each stage of the prompt and of each token took."),
    ] = False,
    request_id: RequestIdOption = None,
    json: JsonOption = False,
) -> None:
    """Answer a prompt with a split model: the answer streams to stdout, the model's thinking to stderr.

    Needs a running `lambda-split broker`, or Redis, and a `lambda-split worker` that serves the same model and
    layers.
    """
    text = check_prompt(read_stdin() if prompt == "-" else prompt)
    check_raw(raw, system, prompt_format, show or ())
    sampling = sampling.checked()
    pictures = [read_prompt_image(user_path(str(path)), str(path)) for path in show or ()]
    template, structured = prompt_format.template(), answer_format.structured()
    passive_threads()
    check_connection(connection)
    choice = model.choice()

    with loading(connection, choice.name):
        import torch

        from split_device.generation.answers import answer_format as how_answers_are_read
        from split_device.generation.chat import Conversation
        from split_device.generation.image_prompts import encode_with_images, load_processor
        from split_device.generation.shown_images import ShownImage
        from split_device.generation.tokenizing import encode_chat, encode_text, load_tokenizer
        from split_device.jobs.models import load_model

        tokenizer = load_tokenizer(*choice.tokenizer_place)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        inputs: Mapping[str, torch.Tensor] = {}
        if pictures:
            processor = load_processor(*choice.tokenizer_place)
            shown = [ShownImage(picture, len(messages) - 1) for picture in pictures]
            encoded = encode_with_images(processor, messages, shown, template=template)
            input_ids, inputs = torch.tensor([encoded]), encoded.images
        else:
            input_ids = encode_text(tokenizer, text) if raw else encode_chat(tokenizer, messages, template=template)
        split = load_model(choice, waiting_for_workers(connection), hardware, images=bool(pictures))
    prompt_ms: dict[str, float] = {}
    with split:

        def note_prompt() -> None:
            prompt_ms.update(split.timings.per_step_ms())
            split.timings.reset()

        with answer_lines(json) as (on_text, on_thinking):
            conversation = Conversation(split, tokenizer, template=template, request_id=request_id)
            format_ = None if raw else how_answers_are_read(tokenizer, template)
            answer = conversation.complete(
                input_ids, sampling, on_text, note_prompt, stop or (), inputs, structured, format_, on_thinking
            )
        token_ms = split.timings.per_step_ms()
        if timings:
            stderr.print(timings_table(prompt_ms, token_ms))
            stderr.print(f"request {answer.request_id}, session {answer.session}", soft_wrap=True)
            stderr.print(f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s after the first")
        if json:
            emit_json(
                dataclasses.asdict(answer)
                | {"tokens_per_second": answer.tokens_per_second}
                | {"prompt_timings_ms": prompt_ms, "timings_ms": token_ms, "traffic": split.traffic}
            )
