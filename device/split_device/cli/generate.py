"""`lambda-split generate`: one prompt, one answer."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Annotated

import msgspec
import typer

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption
from split_common.system.console import emit_json, read_stdin, stderr
from split_common.system.files import user_path
from split_common.system.process import passive_threads
from split_device.cli.answer_format import AnswerFormatOptions
from split_device.cli.checks import check_connection, check_prompt, check_raw
from split_device.cli.groups import (
    AnswerLimits,
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
from split_device.generation.limits import ONE_ANSWER
from split_device.jobs.job import Message, Task
from split_device.jobs.message_images import image_content


@grouped
def generate(
    prompt: PromptArgument,
    model: TextModelOptions,
    connection: ConnectionOptions,
    hardware: HardwareOptions,
    sampling: SamplingOptions,
    prompt_format: PromptFormatOptions,
    answer_format: AnswerFormatOptions,
    limits: AnswerLimits = ONE_ANSWER,
    stop: StopOption = None,
    system: SystemOption = None,
    raw: RawOption = False,
    show: ShowOption = None,
    timings: Annotated[
        bool,
        typer.Option(
            "--timings", help="Print on stderr how long the stages of the prompt and of later steps took."
        ),
    ] = False,
    request_id: RequestIdOption = None,
    json: JsonOption = False,
) -> None:
    """Answer a prompt with a split model: the answer streams to stdout, the model's thinking to stderr.

    Needs a running `lambda-split broker`, or a Redis or Valkey server, and a `lambda-split worker` that serves the
    same model and layers.
    """
    text = check_prompt(read_stdin() if prompt == "-" else prompt)
    check_raw(raw, system, prompt_format, show or ())
    sampling = sampling.checked()
    pictures = tuple(image_content(user_path(str(path)), str(path)) for path in show or ())
    template, structured = prompt_format.template(), answer_format.structured()
    passive_threads()
    check_connection(connection)
    choice = model.choice()
    messages = (Message("system", system),) if system else ()
    task = Task(
        model=choice,
        prompt=text if raw else (*messages, Message("user", text, images=pictures or msgspec.UNSET)),
        sampling=sampling,
        stop=tuple(stop or ()),
        chat_template=template.unless_default(),
        structured=structured or msgspec.UNSET,
    )
    with contextlib.ExitStack() as stack:
        with loading(connection, choice.name):
            from split_device.generation.image_prompts import load_processor
            from split_device.generation.tokenizing import load_tokenizer
            from split_device.jobs.chat import answer
            from split_device.jobs.models import loaded_model, processor_place, prompt_tokens

            tokenizer = load_tokenizer(*choice.tokenizer_place)
            processor = load_processor(*(processor_place(choice) or choice.tokenizer_place)) if pictures else None
            tokens = prompt_tokens(task, tokenizer, processor)
            place = waiting_for_workers(connection), limits, hardware
            loaded = stack.enter_context(loaded_model(choice, *place, tokenizer, processor))
        sums, prompt_ms = loaded.model.timings, dict[str, float]()

        def note_prompt() -> None:
            # Tokens that need no choice come before the first step.
            if not prompt_ms and sums.steps:
                prompt_ms.update({stage: 1000 * seconds for stage, seconds in sums.seconds.items()})
                sums.reset()

        with answer_lines(json) as (on_text, on_thinking):
            said = answer(loaded, task, tokens, on_text, on_thinking, note_prompt, request_id)
        step_ms = sums.per_step_ms()
        if timings:
            stderr.print(timings_table(prompt_ms, step_ms))
            stderr.print(f"request {said.request_id}, session {said.session}", soft_wrap=True)
            stderr.print(f"{said.tokens} tokens, {said.tokens_per_second:.1f} tokens/s after the first")
            if said.drafted_tokens:
                stderr.print(f"{said.accepted_tokens} of {said.drafted_tokens} drafted tokens were right")
        if json:
            emit_json(
                dataclasses.asdict(said)
                | {"tokens_per_second": said.tokens_per_second}
                | {"prompt_timings_ms": prompt_ms, "timings_ms": step_ms, "traffic": loaded.model.traffic}
            )
