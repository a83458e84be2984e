"""`lambda-split batch`: a file of prompts or requests to a file of answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption
from split_common.errors import JobsError
from split_common.system.lock import Held, holding
from split_common.system.outputs import check_output
from split_common.system.process import passive_threads
from split_common.system.signals import catch_sigterm
from split_device.batches.done import check_same, find_done
from split_device.batches.finish import clear
from split_device.batches.outputs import output_form
from split_device.batches.parsing import parsed
from split_device.batches.place import place_of
from split_device.batches.settings import BatchModels, BatchSettings
from split_device.batches.source import open_source
from split_device.batches.template import Template
from split_device.cli.answer_format import AnswerFormatOptions
from split_device.cli.batch_detach import hand_over, report_detached
from split_device.cli.batch_options import (
    OUTPUT_PANEL,
    ColumnOption,
    FormatOption,
    InputFormatOption,
    OverwriteOption,
    ProgressOption,
    TemplateOption,
    check_options,
    chosen_output,
    given_settings,
)
from split_device.cli.batch_run import Running, Work, note, report, report_done, run
from split_device.cli.groups import (
    ConnectionOptions,
    HardwareOptions,
    ImageModelOptions,
    LimitOptions,
    PictureOptions,
    PromptFormatOptions,
    SamplingOptions,
    StartOptions,
    TextModelOptions,
)
from split_device.cli.image_options import ImageOption, MetadataOption
from split_device.cli.options import (
    GIVE_UP,
    AllowedLocalMediaPathOption,
    GiveUpOption,
    RawOption,
    StopOption,
    StoreKeyOption,
    SystemOption,
)
from split_device.jobs.agent import running_agent
from split_device.serving.media import media_directories


@grouped
def batch(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Prompts or requests; `-` is stdin.")],
    model: TextModelOptions,
    connection: ConnectionOptions,
    hardware: HardwareOptions,
    limits: LimitOptions,
    sampling: SamplingOptions,
    prompt_format: PromptFormatOptions,
    answer_format: AnswerFormatOptions,
    picture: PictureOptions,
    start: StartOptions,
    images: ImageModelOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            show_default="with --output-dir, results.jsonl in it",
            help="Where to write the answers; `-` is stdout.",
        ),
    ] = None,
    input_format: InputFormatOption = None,
    column: ColumnOption = None,
    template: TemplateOption = None,
    image: ImageOption = False,
    output_format: FormatOption = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            metavar="DIR",
            rich_help_panel=OUTPUT_PANEL,
            help="Where to write images. Created if it does not exist.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    progress: ProgressOption = "auto",
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Let the agent answer the batch, and return. Starts an agent if none is running."
        ),
    ] = False,
    stop: StopOption = None,
    system: SystemOption = None,
    raw: RawOption = False,
    metadata: MetadataOption = True,
    allowed_local_media_path: AllowedLocalMediaPathOption = None,
    give_up: GiveUpOption = GIVE_UP,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Answer a file of prompts or requests, many at once; after Ctrl-C or a crash, the same command goes on.

    IN has one prompt per line (.txt), objects with a `prompt` or `messages` (.jsonl), a table (.csv, .tsv), or
    requests in the format of OpenAI's batches. When all are done, OUT is written, with the answers in the order of
    the lines. Exit code 1 if any line has an error: run the same command again to retry those lines, or with
    --overwrite to answer all lines anew.
    """
    passive_threads()
    filled = Template(template) if template is not None else None
    settings = BatchSettings(
        BatchModels(model.choice, images.choice),
        images=image,
        template=filled,
        column=column,
        system=system,
        raw=raw,
        sampling=sampling.checked(),
        stop=tuple(stop or ()),
        chat_template=prompt_format.template(),
        structured=answer_format.structured(),
        picture=picture.settings,
        start=start.reference,
        given=given_settings(context),
        metadata=metadata,
        media=media_directories(allowed_local_media_path or ()),
    )
    target = chosen_output(output, output_dir, image)
    check_output(target, source)
    began = time.perf_counter()
    interrupted = catch_sigterm()
    place = place_of(target, source)
    try:
        with open_source(source, input_format, filled is not None) as lines, holding(place.lock, remove=True):
            check_options(context, lines.form, image, output_dir)
            work = Work(place, source, target, output_format or output_form(target), output_dir, detach)
            if not overwrite and (done := find_done(place, target)) is not None:
                entries = (line.entry for line in parsed(lines, settings, output_dir is not None, note))
                check_same(done, entries, target, work.output_form, output_dir, store_key)
                left = place.record()
                if left is not None and not left.detached and (left.finished or left.written != done.written):
                    # Of a process that was killed when all was written; not of one that is yet to write.
                    clear(place, left, 0)
                report_done(place, target, done, json)
                return
            before = work.check_new(overwrite)
            with work.begun(lines, settings, store_key, overwrite, before) as begun:
                if not detach:
                    answered = run(begun, Running(connection, hardware, limits, give_up, progress, interrupted))
            if not detach:
                clear(place, begun.record, answered.summary.errors)
    except Held as held:
        raise JobsError(_held(held.pid, target, place.name)) from None
    if detach:
        report_detached(begun, hand_over(context, connection.broker), json)
    else:
        report(begun, answered, time.perf_counter() - began, json)


def _held(pid: int, output: Path, name: str) -> str:
    """The message that another process works on the batch."""
    if pid == running_agent():
        return f"the agent is already working on {output}: `lambda-split jobs watch {name}` shows how far it is"
    return f"process {pid} is already working on {output}"
