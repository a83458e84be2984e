"""The `lambda-split demo` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.options import JsonOption, ModelOption, given
from split_common.errors import ConfigError
from split_common.models.demo_model import resolve_model
from split_common.system.process import passive_threads
from split_device.cli.demo.fleet import running_fleet
from split_device.cli.demo.image import image_demo
from split_device.cli.demo.language import QUESTION, answer_batch, ask, serve_demo

#: Options that do not go with --image, and that need it.
_TEXT_OPTIONS = ("--model", "--max-tokens", "--workers")
_IMAGE_OPTIONS = ("--output",)


def demo(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", show_default="a question about Paris", help="What to ask."),
    ] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Answer a small file of prompts instead.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Run the HTTP server and its chat page instead, until Ctrl-C.")
    ] = False,
    image: Annotated[
        bool,
        typer.Option("--image", help="Make images instead, with the small model in a clone of the repository."),
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to write the images, a .png file. Needs --image."
        ),
    ] = Path("digits.png"),
    model: ModelOption = None,
    max_tokens: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Maximum number of tokens of an answer. Has no effect with --serve."),
    ] = 64,
    workers: Annotated[int, typer.Option(min=1, max=16, metavar="N", help="Number of worker processes.")] = 1,
    json: JsonOption = False,
) -> None:
    """Ask a real model that is split between this process and a worker process, connected by a broker process.

    All processes run on this machine, with keys made for the demo, and end with the command.
    """
    if batch + serve + image + (prompt is not None) > 1:
        raise ConfigError("PROMPT, --batch, --serve and --image exclude each other: give only one of them")
    for option in given(context, _TEXT_OPTIONS if image else _IMAGE_OPTIONS):
        raise ConfigError(f"{option} does not go with --image" if image else f"{option} needs --image")
    if image:
        image_demo(output, json)
        return
    passive_threads()
    checkpoint = resolve_model(model)
    with running_fleet(["--model", checkpoint], workers) as fleet:
        options = ["--model", checkpoint, "--broker", fleet.address]
        if batch:
            answer_batch(options, fleet.directory, max_tokens, json)
        elif serve:
            serve_demo(options, json)
        else:
            ask(fleet, prompt or QUESTION, checkpoint, max_tokens, json)
