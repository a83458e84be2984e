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

#: Options that --image has no use for, and that only it has.
_NOT_FOR_IMAGES = ("--model", "--max-tokens", "--workers")
_FOR_IMAGES = ("--output",)


def demo(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to ask. Default: a question about Paris.")
    ] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Answer a small file of prompts instead.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Run the HTTP server and its chat page instead, until Ctrl-C.")
    ] = False,
    image: Annotated[
        bool,
        typer.Option("--image", help="Make pictures instead, with the small model in a clone of the repository."),
    ] = False,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="With --image: where to write the pictures, as .png."),
    ] = Path("digits.png"),
    model: ModelOption = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of tokens of an answer; not for --serve.")
    ] = 64,
    workers: Annotated[int, typer.Option(min=1, max=16, metavar="N", help="Number of worker processes.")] = 1,
    json: JsonOption = False,
) -> None:
    """Ask a real model, split between this process and a worker process, over a broker process.

    All run on this machine, with keys of their own, and end with the command.
    """
    if batch + serve + image + (prompt is not None) > 1:
        raise ConfigError("PROMPT, --batch, --serve and --image exclude each other: give only one of them")
    for option in given(context, _NOT_FOR_IMAGES if image else _FOR_IMAGES):
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
