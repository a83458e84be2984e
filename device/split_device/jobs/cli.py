"""`lambda-split submit` and `lambda-split jobs …`: asking for a text or an image now, and coming back for it."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from split_common.cli.options import MODEL_PANEL, DtypeOption, JsonOption, RevisionOption, given
from split_common.console import emit_json, stderr, stdout
from split_common.errors import AgentError, ConfigError
from split_common.files import write_private
from split_device.diffusion.options import (
    IMAGE_MODEL,
    CodecOption,
    CutOption,
    GuidanceOption,
    NegativeOption,
    ReuseOption,
    SizeOption,
    StepsOption,
    check_output,
    image_settings,
    need_diffusers,
    pipeline_directory,
    step_progress,
)
from split_device.diffusion.settings import image_bytes, image_format
from split_device.jobs.agent import running_agent
from split_device.jobs.job import (
    FINAL,
    AnyTask,
    ImageChoice,
    ImageTask,
    Job,
    Message,
    ModelChoice,
    State,
    Task,
)
from split_device.jobs.options import STORE_PANEL, StoreKeyOption, checkpoint, parse_age
from split_device.jobs.store import Store, store_path
from split_device.jobs.watch import answer, follow, picture
from split_device.options import (
    HeadOption,
    MaxTokensOption,
    SeedOption,
    SystemOption,
    TailOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from split_device.settings import Sampling

app = typer.Typer(
    no_args_is_help=True, help="Look after the jobs that were submitted.", rich_markup_mode="markdown"
)

#: Parameters of `submit` that go with texts alone, and with images alone.
_OF_TEXTS = ("max_tokens", "temperature", "top_p", "top_k", "stop", "system", "raw", "head_layers", "tail_layers")
_OF_IMAGES = ("output", "steps", "size", "guidance", "negative", "cut", "codec", "reuse")

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The id that `submit` printed.")]


def submit(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt.")] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="Read the prompt from a file; `-` is stdin.")
    ] = None,
    image: Annotated[bool, typer.Option("--image", help="Ask for an image, not for a text.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stream the answer, and end with it.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            rich_help_panel=MODEL_PANEL,
            help="Directory or hub id of a checkpoint; of images the directory of a pipeline. "
            f"Default: $LAMBDA_SPLIT_MODEL, else SmolLM2-135M-Instruct; of images ${IMAGE_MODEL}.",
        ),
    ] = None,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    system: SystemOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="With --image and --wait: a .png, .jpg or .webp file."),
    ] = None,
    steps: StepsOption = 20,
    size: SizeOption = None,
    guidance: GuidanceOption = None,
    negative: NegativeOption = None,
    priority: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=STORE_PANEL, help="Jobs with a higher one run first.")
    ] = 0,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            rich_help_panel=STORE_PANEL,
            help="If there is a job of this key, it is the one: submitting twice runs once.",
        ),
    ] = None,
    head_layers: HeadOption = 2,
    tail_layers: TailOption = 2,
    cut: CutOption = "C",
    codec: CodecOption = "none",
    reuse: ReuseOption = 1,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Ask for an answer to a prompt, or with --image for an image, and print the job's id.

    `lambda-split agent start` runs it. It is kept on this machine's disk, readable by this user alone, until
    `jobs prune` removes it.
    """
    text = _prompt(prompt, file)
    _check_kind(context, image)
    if raw and system:
        raise ConfigError("--raw and --system do not go together: a raw prompt has no messages")
    if output is not None:
        if not wait:
            raise ConfigError("-o goes with --wait; later `lambda-split jobs result JOB -o FILE` writes the image")
        check_output(output)
    if wait and running_agent() is None:
        raise AgentError("no agent runs, so nothing was submitted: `lambda-split agent start`")
    task: AnyTask
    if image:
        need_diffusers()
        directory = pipeline_directory(model or os.environ.get(IMAGE_MODEL))
        task = ImageTask(
            model=ImageChoice(name=directory, cut=cut, codec=codec, reuse=reuse, dtype=dtype),
            prompt=text,
            settings=image_settings(directory, steps, seed, size, guidance, negative),
        )
    else:
        name = checkpoint(model or os.environ.get("LAMBDA_SPLIT_MODEL"))
        messages = (*((Message("system", system),) if system else ()), Message("user", text))
        task = Task(
            model=ModelChoice(
                name=name, revision=revision, head_layers=head_layers, tail_layers=tail_layers, dtype=dtype
            ),
            prompt=text if raw else messages,
            sampling=Sampling(max_tokens, temperature, top_p, top_k, seed),
            stop=tuple(stop or ()),
        )
    with Store(store_path(), store_key) as store:
        job = store.submit(task, priority, key)
        if wait:
            stderr.print(job.id)
            _show_output(store, job, output, json)
        elif json:
            emit_json(_facts(job))
        else:
            print(job.id)
        if running_agent() is None:
            stderr.print("no agent runs: `lambda-split agent start` runs it")


@app.command("list")
def list_jobs(
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only those that are queued, running, succeeded, failed or cancelled; may be repeated.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="The newest so many.")] = 50,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """List jobs, the newest first."""
    with Store(store_path(), store_key) as store:
        jobs = store.jobs(_states(state), limit)
    if json:
        emit_json({"jobs": [_facts(job) for job in jobs]})
        return
    # Narrow enough that in 80 columns only the model's name is ever cut.
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("job", "state", "priority", "submitted", "model", "made"):
        table.add_column(column, no_wrap=column != "model")
    for job in jobs:
        model = Path(job.task.model.name).name
        table.add_row(job.id, job.state, str(job.priority), _clock(job.created)[:-3], model, _made(job))
    stdout().print(table)


@app.command()
def show(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Show what is known of a job, but for its prompt and its answer."""
    with Store(store_path(), store_key) as store:
        facts = _facts(store.get(job))
    if json:
        emit_json(facts)
        return
    for name, value in facts.items():
        if value is not None:
            print(f"{name}: {_clock(value) if name in ('created', 'started', 'finished') else value}")


@app.command()
def watch(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Stream a job's answer, from its beginning, until it has ended; of an image show the steps."""
    with Store(store_path(), store_key) as store:
        _show_output(store, store.get(job), None, json)


@app.command()
def result(
    job: JobArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where an image goes: a .png, .jpg or .webp file."),
    ] = None,
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Print the answer of a job that has succeeded, or write its image. Exit code 1 if it has not."""
    with Store(store_path(), store_key) as store:
        found = store.get(job)
        if found.kind == "image":
            if output is None:
                raise ConfigError(f"job {job} makes an image: give -o FILE")
            check_output(output)
            _write_image(picture(store, found), output)
            if json:
                emit_json(_facts(found) | {"output": str(output)})
            else:
                stderr.print(f"wrote {output}", soft_wrap=True)
            return
        text = answer(store, found)
    if output is not None:
        raise ConfigError(f"job {job} makes a text, which is printed: -o goes with images")
    if json:
        emit_json(_facts(found) | {"text": text})
    else:
        print(text)


@app.command()
def cancel(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Cancel a job; one that runs is cancelled by the agent within a second."""
    _change(job, store_key, json, Store.cancel)


@app.command()
def retry(job: JobArgument, store_key: StoreKeyOption = None, json: JsonOption = False) -> None:
    """Let a failed or cancelled job go on from where it was."""
    _change(job, store_key, json, Store.retry)


@app.command()
def prune(
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Jobs that ended so long ago: 90s, 30m, 12h or 7d; 0s for all.")
    ] = "7d",
    store_key: StoreKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Remove jobs that have ended, with their prompts and answers."""
    age = parse_age(older_than)
    with Store(store_path(), store_key) as store:
        removed = store.prune(time.time() - age)
    if json:
        emit_json({"removed": removed})
    else:
        stderr.print(f"removed {removed} jobs")


def _change(id_: str, store_key: Path | None, json: bool, change: Callable[[Store, str], Job]) -> None:
    with Store(store_path(), store_key) as store:
        job = change(store, id_)
    if json:
        emit_json(_facts(job))
    else:
        stderr.print(f"{job.id} is {'cancelled soon' if job.cancelling else job.state}")


def _show_output(store: Store, job: Job, output: Path | None, json: bool) -> None:
    """Follows a job to its end. Raises JobsError if it does not succeed."""
    if isinstance(job.task, ImageTask):
        _show_image(store, job, job.task.settings.steps, output, json)
    else:
        _show_answer(store, job, json)


def _show_answer(store: Store, job: Job, json: bool) -> None:
    def print_now(text: str) -> None:
        if not json:
            print(text, end="", flush=True)

    job = follow(store, job.id, print_now)
    if not json:
        print(flush=True)
    text = answer(store, job)
    if json:
        emit_json(_facts(job) | {"text": text})


def _show_image(store: Store, job: Job, steps: int, output: Path | None, json: bool) -> None:
    with step_progress(steps, json) as advance:
        job = follow(store, job.id, on_step=lambda done: advance(done, max(done, steps)))
    made = picture(store, job)
    if output is not None:
        _write_image(made, output)
    if json:
        emit_json(_facts(job) | {"output": str(output) if output is not None else None})
    elif output is not None:
        stderr.print(f"wrote {output}", soft_wrap=True)
    else:
        stderr.print(f"the image is made: `lambda-split jobs result {job.id} -o FILE` writes it", soft_wrap=True)


def _write_image(png: bytes, path: Path) -> None:
    """Writes an image in the format that the file's name says."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        write_private(path.absolute(), image_bytes(image, image_format(path.name)))


def _check_kind(context: typer.Context, image: bool) -> None:
    """Raises ConfigError for an option of the other kind."""
    for option in given(context, _OF_TEXTS if image else _OF_IMAGES):
        raise ConfigError(f"{option} goes with texts: leave --image out" if image else f"{option} needs --image")


def _made(job: Job) -> str:
    """How far a job has come."""
    if isinstance(job.task, ImageTask):
        return f"{job.steps} of {job.task.settings.steps} steps"
    return f"{job.tokens} tokens"


def _prompt(prompt: str | None, file: str | None) -> str:
    """Raises ConfigError."""
    if (prompt is None) == (file is None):
        raise ConfigError("give a prompt, or --file")
    try:
        text = prompt if prompt is not None else sys.stdin.read() if file == "-" else Path(file or "").read_text()
        text.encode()
    except UnicodeError:
        raise ConfigError("the prompt is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return text


def _states(names: list[str] | None) -> list[State]:
    known: dict[str, State] = {state: state for state in ("queued", "running", *FINAL)}
    try:
        return [known[name] for name in names or ()]
    except KeyError as error:
        raise ConfigError(f"{error} is no state; there are {', '.join(known)}") from None


def _facts(job: Job) -> dict[str, Any]:
    """What is shown of a job."""
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "cancelling": job.cancelling,
        "priority": job.priority,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "model": job.task.model.name,
        "seed": job.task.seed,
        "prompt_tokens": job.prompt_tokens,
        "tokens": job.tokens,
        "steps": job.steps,
        "finish_reason": job.finish_reason,
        "error": job.error,
    }


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
