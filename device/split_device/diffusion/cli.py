"""The `lambda-split image` command."""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from split_common.console import emit_json, stderr
from split_common.errors import ConfigError, ModelError, SplitError
from split_common.files import write_private
from split_common.fleet import load_fleet
from split_common.options import (
    DEFAULT_BROKER,
    MODEL_PANEL,
    BrokerOption,
    DtypeOption,
    JsonOption,
    KeysOption,
    MemberOption,
    TimeoutOption,
)
from split_common.process import passive_threads
from split_common.transport import connect
from split_device.diffusion.saving import parse_reuse

_WIRE = "On the way"

#: Names of files, and what Pillow calls their formats.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def image(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the image should show.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to: a .png, .jpg or .webp file.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR",
            envvar="LAMBDA_SPLIT_IMAGE_MODEL",
            rich_help_panel=MODEL_PANEL,
            help="Directory of a pipeline in diffusers' safetensors format.",
        ),
    ] = None,
    broker: BrokerOption = DEFAULT_BROKER,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Denoising steps.")] = 20,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same image.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="In pixels. Default: what the model was made for.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, metavar="G", help="How closely to follow the prompt; 1 to not guide.")
    ] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What the image should not show.")] = None,
    init_image: Annotated[
        Path | None, typer.Option("--init-image", metavar="FILE", help="Begin with this image, not with noise.")
    ] = None,
    strength: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="S", help="How much to change of the image begun with.")
    ] = 0.6,
    cut: Annotated[
        Literal["A", "C"],
        typer.Option(
            rich_help_panel=MODEL_PANEL, help="Where the model is cut: A keeps more of it here than C. As workers."
        ),
    ] = "C",
    codec: Annotated[
        Literal["none", "fp16", "int8", "int4"],
        typer.Option(rich_help_panel=_WIRE, help="How states travel; none sends them as they are."),
    ] = "none",
    reuse: Annotated[
        float,
        typer.Option(
            parser=parse_reuse,
            metavar="N|SHARE",
            rich_help_panel=_WIRE,
            help="From 1, call the worker at every N-th step only; below 1, like 0.05, only when its input has "
            "changed by more than this share since it was called last. Its output is reused between. 1 is exact.",
        ),
    ] = 1,
    dtype: DtypeOption = "auto",
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    json: JsonOption = False,
) -> None:
    """Make an image by a split diffusion model.

    Needs a running `lambda-split broker`, or Redis, and a `lambda-split worker --cut …` that serves the same model.
    """
    if output.suffix.lower() not in FORMATS:
        raise ConfigError(f"{output} is no name of an image: take one of {', '.join(FORMATS)}")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output.parent} is no directory")
    if model is None:
        raise ConfigError("no model: give --model DIR, the directory of a pipeline (or LAMBDA_SPLIT_IMAGE_MODEL)")
    if init_image is not None and size is not None:
        raise ConfigError("--init-image and --size do not go together: the image has a size")
    options = _options(steps, size, guidance, negative)
    passive_threads()
    fleet = load_fleet(keys)
    connect(broker, fleet, fleet.identity("device", member))

    import torch

    from split_device.diffusion.kinds import load_denoiser

    if init_image is not None:
        options |= {"image": _read_image(init_image), "strength": strength}
    if seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    with load_denoiser(
        model,
        broker=broker,
        cut=cut,
        codec=codec,
        reuse=reuse,
        dtype=dtype,
        keys=keys,
        member=member,
        timeout=timeout,
    ) as denoiser:
        pipeline = _load_pipeline(model, denoiser, init_image is not None)
        began = time.perf_counter()
        with _refused_input(), _progress(steps, json) as advance:
            made = pipeline(prompt, callback_on_step_end=advance, **options).images[0]
        seconds = time.perf_counter() - began
        content = io.BytesIO()
        made.save(content, FORMATS[output.suffix.lower()])
        write_private(output.absolute(), content.getvalue())
        calls = denoiser.timings.steps
        if json:
            emit_json(
                {
                    "output": str(output),
                    "width": made.width,
                    "height": made.height,
                    "seconds": seconds,
                    "calls": calls,
                    "timings_ms": denoiser.timings.per_step_ms(),
                    "traffic": denoiser.traffic,
                }
            )
        else:
            facts = f"{made.width}x{made.height}, {seconds:.1f} s, {calls} calls of the worker"
            stderr.print(f"{output}: {facts}", soft_wrap=True)


def _options(steps: int, size: str | None, guidance: float | None, negative: str | None) -> dict[str, Any]:
    """What a pipeline is called with. Raises ConfigError."""
    options: dict[str, Any] = {"num_inference_steps": steps}
    if size is not None:
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size)
        if not match or not all(int(part or match[1]) for part in match.groups()):
            raise ConfigError(f"{size!r} is no size: write it like 512x512")
        options |= {"width": int(match[1]), "height": int(match[2] or match[1])}
    if guidance is not None:
        options["guidance_scale"] = guidance
    if negative is not None:
        options["negative_prompt"] = negative
    return options


def _read_image(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as an image: {error}") from None


def _load_pipeline(model: str, denoiser: Any, from_image: bool) -> Any:
    """The checkpoint's own pipeline with the split denoiser. Raises ModelError."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    kind = diffusers.AutoPipelineForImage2Image if from_image else diffusers.AutoPipelineForText2Image
    try:
        pipeline = kind.from_pretrained(model, **denoiser.pipeline_options(), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{model} is no pipeline that can be loaded: {reason[0]}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _refused_input() -> Iterator[None]:
    """What a pipeline says of its arguments is said as any wrong option."""
    try:
        yield
    except SplitError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


@contextlib.contextmanager
def _progress(steps: int, quiet: bool) -> Iterator[Callable[..., dict[str, Any]]]:
    """A bar on stderr; yields what a pipeline calls after each step."""
    from rich.progress import Progress

    with Progress(console=stderr, transient=True, disable=quiet) as bar:
        task = bar.add_task("steps", total=steps)

        def advance(pipeline: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            bar.update(task, total=getattr(pipeline, "num_timesteps", steps), completed=step + 1)
            return values

        yield advance
