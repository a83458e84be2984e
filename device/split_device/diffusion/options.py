"""What the commands of images share: options, checks and a bar of steps."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from split_common.cli.options import MODEL_PANEL
from split_common.console import stderr
from split_common.errors import ConfigError
from split_device.diffusion.saving import parse_reuse
from split_device.diffusion.settings import ImageSettings, check_size, image_format, parse_pixels

_WIRE = "On the way"

Cut = Literal["A", "C"]
CodecName = Literal["none", "fp16", "int8", "int4"]

#: Of the environment: the image model where none is named.
IMAGE_MODEL = "LAMBDA_SPLIT_IMAGE_MODEL"

StepsOption = Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Denoising steps.")]
ImageSeedOption = Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same image.")]
SizeOption = Annotated[
    str | None, typer.Option(metavar="WIDTHxHEIGHT", help="In pixels. Default: what the model was made for.")
]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0.0, metavar="G", help="How closely to follow the prompt; 1 to not guide.")
]
NegativeOption = Annotated[str | None, typer.Option(metavar="TEXT", help="What the image should not show.")]
CutOption = Annotated[
    Cut,
    typer.Option(
        rich_help_panel=MODEL_PANEL,
        help="Where the model is cut: A keeps more of it here than C. Workers must have the same.",
    ),
]
CodecOption = Annotated[
    CodecName, typer.Option(rich_help_panel=_WIRE, help="How states travel; none sends them as they are.")
]
ReuseOption = Annotated[
    float,
    typer.Option(
        parser=parse_reuse,
        metavar="N|SHARE",
        rich_help_panel=_WIRE,
        help="From 1, call the worker at every N-th step only; below 1, like 0.05, only when its input has "
        "changed by more than this share since it was called last. Its output is reused between. 1 is exact.",
    ),
]


def image_settings(
    directory: str, steps: int, seed: int | None, size: str | None, guidance: float | None, negative: str | None
) -> ImageSettings:
    """Raises ConfigError for what the pipeline in this directory cannot make."""
    width, height = parse_pixels(size) if size is not None else (None, None)
    settings = ImageSettings(steps, width, height, guidance, negative, seed)
    check_size(directory, settings)
    return settings


def pipeline_directory(model: str | None) -> str:
    """The pipeline's directory, from wherever it will be loaded. Raises ConfigError."""
    if model is None:
        raise ConfigError(f"no model: give --model DIR, the directory of a pipeline (or {IMAGE_MODEL})")
    if not (Path(model) / "model_index.json").is_file():
        raise ConfigError(f"{model} is no directory of a pipeline: it has no model_index.json")
    return str(Path(model).resolve())


def need_diffusers() -> None:
    """Raises ConfigError where images cannot be made."""
    if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("PIL") is None:
        raise ConfigError("images need more packages: pip install 'lambda-split[diffusion]'")


def check_output(path: Path) -> None:
    """Raises ConfigError where no image could be written, before any work is done for it."""
    image_format(path.name)
    directory = path.absolute().parent
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory")
    if path.is_dir():
        raise ConfigError(f"{path} is a directory")
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def step_progress(steps: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; yields what is told how many steps are done, and how many there are."""
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=stderr,
        transient=True,
        disable=quiet or not stderr.is_terminal,
    ) as bar:
        task = bar.add_task("steps", total=steps)
        yield lambda done, total: bar.update(task, completed=done, total=total)
