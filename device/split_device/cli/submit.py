"""`lambda-split submit`: adds a job for a text or an image, which the agent runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from msgspec import UNSET

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption, given
from split_common.errors import AgentError, ConfigError
from split_common.system.console import emit_json, read_stdin, stderr
from split_common.system.text import read_text
from split_device.batches.settings import BatchModels, BatchSettings
from split_device.batches.template import Template
from split_device.cli.answer_format import ANSWER_OPTIONS, AnswerFormatOptions
from split_device.cli.batch_options import INPUT_PANEL, ColumnOption, InputFormatOption, TemplateOption
from split_device.cli.checks import check_prompt, check_raw
from split_device.cli.groups import (
    ImageModel,
    ImageModelOptions,
    JobSamplingOptions,
    Picture,
    PictureOptions,
    PromptFormatOptions,
    Start,
    StartOptions,
    TextModelOptions,
)
from split_device.cli.image_options import ImageOption, MetadataOption
from split_device.cli.job_output import interruptible, show_output
from split_device.cli.options import (
    STORE_PANEL,
    GroupOption,
    OnDoneOption,
    RawOption,
    RequestIdOption,
    ShowOption,
    StopOption,
    StoreKeyOption,
    SystemOption,
    WebhookOption,
)
from split_device.cli.sampling_options import ADJUSTMENTS
from split_device.cli.submit_lines import LineJobs, submit_lines
from split_device.images.settings import check_image_output
from split_device.jobs.agent import running_agent
from split_device.jobs.hooks import command_action, webhook_action
from split_device.jobs.job import AnyTask, ImageTask, Message, Task
from split_device.jobs.message_images import image_file
from split_device.jobs.shown import job_facts
from split_device.jobs.store import Store, store_path

#: Options for texts only, and for images only.
_TEXT_OPTIONS = (
    "--max-tokens",
    "--temperature",
    "--top-p",
    "--top-k",
    *ADJUSTMENTS.values(),
    "--speculate",
    "--stop",
    "--system",
    "--show",
    "--raw",
    "--chat-template",
    "--chat-template-kwargs",
    *ANSWER_OPTIONS,
    "--tokenizer",
    "--layers",
    "--revision",
    "--adapter",
)
_IMAGE_OPTIONS = (
    "--image-model",
    "--output",
    "--steps",
    "--size",
    "--guidance",
    "--negative",
    "--init-image",
    "--strength",
    "--cut",
    "--reuse",
    "--metadata",
)


@grouped
def submit(
    context: typer.Context,
    sampling: JobSamplingOptions,
    prompt_format: PromptFormatOptions,
    answer_format: AnswerFormatOptions,
    picture: PictureOptions,
    start: StartOptions,
    text_model: TextModelOptions,
    images: ImageModelOptions,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; `-` is stdin.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Read the prompt from a file; `-` is stdin.")
    ] = None,
    each_line: Annotated[
        Path | None,
        typer.Option(
            "--each-line",
            metavar="FILE",
            rich_help_panel=INPUT_PANEL,
            help="Submit a job for each line of a file: a prompt, an object with a `prompt`, or a row of a table; "
            "`-` is stdin.",
        ),
    ] = None,
    input_format: InputFormatOption = None,
    column: ColumnOption = None,
    template: TemplateOption = None,
    image: ImageOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the job and stream its answer.")] = False,
    stop: StopOption = None,
    system: SystemOption = None,
    show: ShowOption = None,
    raw: RawOption = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write the image: a .png, .jpg or .webp file; `-` is stdout. Needs --image and --wait.",
        ),
    ] = None,
    metadata: MetadataOption = True,
    priority: Annotated[
        int,
        typer.Option(
            min=-(2**31),
            max=2**31 - 1,
            metavar="N",
            rich_help_panel=STORE_PANEL,
            help="Jobs of higher priority run first.",
        ),
    ] = 0,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            rich_help_panel=STORE_PANEL,
            help="A name for the job. If a job with this key exists, its id is printed and none is added; it must "
            "ask for the same. With --each-line, each line's key is this one and the line's number.",
        ),
    ] = None,
    group: GroupOption = None,
    request_id: RequestIdOption = None,
    on_done: OnDoneOption = None,
    webhook: WebhookOption = None,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Submit a prompt for an answer, or with --image for an image, and print the job's id.

    With --each-line, each line of a file is a job, and the ids are printed one per line. Jobs are kept on
    this machine's disk, readable by you alone, until they are pruned. An agent runs them: start one with
    `lambda-split agent start`.
    """
    _check_kind(context, image)
    actions = [command_action(on_done)] if on_done is not None else []
    actions += [webhook_action(webhook)] if webhook is not None else []
    check_raw(raw, system, prompt_format, show or ())
    if given(context, ["--model"]) and image:
        stderr.print("warning: with --image, --model is an old name: use --image-model")
        images = dataclasses.replace(images, image_model=text_model.model)
    if each_line is not None:
        if prompt is not None or file is not None or wait or request_id is not None:
            raise ConfigError("--each-line goes with neither a prompt nor --file, --wait or --request-id")
        if show:
            raise ConfigError("--each-line and --show do not go together: submit a job for each image")
        settings = BatchSettings(
            BatchModels(text_model.choice, images.choice),
            images=image,
            template=Template(template) if template is not None else None,
            column=column,
            system=system,
            raw=raw,
            sampling=sampling.checked(),
            stop=tuple(stop or ()),
            chat_template=prompt_format.template(),
            structured=answer_format.structured(),
            picture=picture.settings,
            start=start.reference,
        )
        with Store(store_path(), store_key) as store:
            submit_lines(store, each_line, input_format, settings, LineJobs(priority, key, group, actions), json)
    else:
        for option in given(context, ("--input-format", "--column", "--template")):
            raise ConfigError(f"{option} needs --each-line")
        text = _prompt(prompt, file)
        if output is not None:
            _check_output(output, wait)
        if wait and running_agent() is None:
            raise AgentError(
                "nothing was submitted, because no agent is running: `lambda-split agent start` starts one"
            )
        task: AnyTask
        if image:
            task = _image_task(text, images, picture, start)
        else:
            asked = Message("user", text, images=tuple(image_file(path) for path in show or ()) or UNSET)
            messages = (*((Message("system", system),) if system else ()), asked)
            task = Task(
                model=text_model.choice(),
                prompt=text if raw else messages,
                sampling=sampling.checked(),
                stop=tuple(stop or ()),
                chat_template=prompt_format.template().unless_default(),
                structured=answer_format.structured() or UNSET,
            )
        with Store(store_path(), store_key) as store:
            job = store.submit(task, priority, key, group, request_id)
            if request_id not in (None, job.request_id):
                stderr.print(f"note: {job.id} exists, and keeps its request id {job.request_id}", soft_wrap=True)
            # A job with this key may be in another group, or in none.
            store.hooks.add(actions, [job.id], job.group if group is not None else None)
            if wait:
                with interruptible(job):
                    stderr.print(job.id)
                    show_output(store, job, output, json, metadata)
            elif json:
                emit_json(job_facts(job))
            else:
                print(job.id)
    if running_agent() is None:
        stderr.print("no agent is running: `lambda-split agent start` starts one")


def _image_task(text: str, model: ImageModel, picture: Picture, start: Start) -> ImageTask:
    choice = model.choice()
    settings = picture.settings(choice.name)
    init_image = start.reference(settings, choice.name)
    return ImageTask(model=choice, prompt=text, settings=settings, init_image=init_image)


def _check_output(output: Path, wait: bool) -> None:
    """Raises ConfigError if the image cannot be written there, or not by this command."""
    if not wait:
        raise ConfigError("-o needs --wait; later, `lambda-split jobs result JOB -o FILE` writes the image")
    check_image_output(output)


def _check_kind(context: typer.Context, image: bool) -> None:
    """Raises ConfigError for an option of texts if the job is an image, and the reverse."""
    for option in given(context, _TEXT_OPTIONS if image else _IMAGE_OPTIONS):
        raise ConfigError(f"{option} is for texts: leave --image out" if image else f"{option} needs --image")


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the command line, a file or stdin. Raises ConfigError."""
    if (prompt is None) == (file is None):
        raise ConfigError("give either a prompt, --file or --each-line")
    if prompt == "-" or (file is not None and str(file) == "-"):
        return check_prompt(read_stdin())
    return check_prompt(prompt or "" if file is None else read_text(file))
