"""`lambda-split image`: an image made by a split diffusion model."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from split_common.cli.groups import grouped
from split_common.cli.options import MODEL_PANEL, JsonOption
from split_common.system.console import emit_json, print_text, read_stdin
from split_common.system.outputs import is_stream, output_name
from split_common.system.process import passive_threads
from split_common.system.signals import exit_on_sigterm
from split_device.cli.checks import check_connection, check_prompt
from split_device.cli.groups import (
    CONNECTION,
    IMAGE_MODEL_CUT,
    HardwareOptions,
    ImageModel,
    PictureOptions,
    StartOptions,
)
from split_device.cli.image_options import IMAGE_MODEL_HELP, MetadataOption
from split_device.cli.job_output import print_notes
from split_device.cli.options import ImageCodecOption, PromptArgument, RequestIdOption
from split_device.cli.terminal import loading, step_progress, waiting_for_workers
from split_device.images.files import notes, write_image
from split_device.images.settings import DRAWN_SEED_BITS, IMAGE_MODEL, check_image_output
from split_device.sessions.connection import Connection

if TYPE_CHECKING:
    from split_device.models.denoiser import SplitDenoiser

#: `--image-model`, which has a shorter name where no other model is meant.
_AliasedModelOption = Annotated[
    str | None,
    typer.Option(
        "--image-model",
        "--model",
        metavar="DIR",
        envvar=IMAGE_MODEL,
        rich_help_panel=MODEL_PANEL,
        help=IMAGE_MODEL_HELP,
    ),
]


@grouped
def image(
    prompt: PromptArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write the image: a .png, .jpg or .webp file; `-` is stdout. An existing file is "
            "replaced.",
        ),
    ],
    model: Annotated[
        ImageModel,
        IMAGE_MODEL_CUT.without("image_model", "codec").plus(
            image_model=_AliasedModelOption, codec=ImageCodecOption
        ),
    ],
    picture: PictureOptions,
    start: StartOptions,
    hardware: HardwareOptions,
    connection: Annotated[Connection, CONNECTION.without("history_memory", "pad_steps")],
    metadata: MetadataOption = True,
    request_id: RequestIdOption = None,
    json: JsonOption = False,
) -> None:
    """Make an image with a split diffusion model.

    Needs a running `lambda-split broker`, or a Redis or Valkey server, and a `lambda-split worker` that serves the
    same model with the same cut. Ctrl-C ends the command, and no file is written.
    """
    text = check_prompt(read_stdin() if prompt == "-" else prompt)
    check_image_output(output, start.init_image)
    choice = model.choice()
    # A seed that is drawn is printed, so that the image can be made again.
    seed = secrets.randbits(DRAWN_SEED_BITS) if picture.seed is None else picture.seed
    settings = dataclasses.replace(picture, seed=seed).settings(choice.name)
    more = start.read(settings, choice.name)
    passive_threads()
    check_connection(connection)
    with exit_on_sigterm(), contextlib.ExitStack() as stack:
        with loading(connection, choice.name):
            from split_device.images.pipeline import ImagePipeline
            from split_device.jobs.models import load_image_model

            denoiser = stack.enter_context(load_image_model(choice, waiting_for_workers(connection), hardware))
            denoiser.begin(request_id)
            pipeline = ImagePipeline(choice.name, denoiser)
        began = time.perf_counter()
        with step_progress(picture.steps, json) as advance:
            made = pipeline.generate(text, settings, advance, **more)
        seconds = time.perf_counter() - began
        write_image(made, output, metadata=metadata)
        _report(output, made, seed, seconds, denoiser, json)


def _report(output: Path, made: Any, seed: int, seconds: float, denoiser: SplitDenoiser, json: bool) -> None:
    """Prints how an image was made."""
    calls = denoiser.timings.steps
    if json:
        emit_json(
            {
                "output": str(output),
                "width": made.width,
                "height": made.height,
                "seed": seed,
                "seconds": seconds,
                "calls": calls,
                "notes": notes(made),
                "timings_ms": denoiser.timings.per_step_ms(),
                "traffic": denoiser.traffic,
            }
        )
    else:
        facts = f"{made.width}x{made.height}, seed {seed}, {seconds:.1f} s, {calls} calls of the worker"
        # Where the image went into a pipe, it may be stdout.
        print_text(f"{output_name(output)}: {facts}", stream=sys.stderr if is_stream(output) else sys.stdout)
        print_notes(made)
