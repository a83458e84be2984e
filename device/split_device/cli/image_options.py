"""Options of images that several commands of the device share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.options import MODEL_PANEL
from split_device.generation.settings import BOUNDS
from split_device.images.settings import IMAGE_MODEL, STRENGTH
from split_device.models.compression import parse_reuse

_IMAGE_PANEL = "Images"

IMAGE_MODEL_HELP = "Directory of a pipeline in diffusers' safetensors format."
ImageModelOption = Annotated[
    str | None,
    typer.Option(
        "--image-model",
        metavar="DIR",
        envvar=IMAGE_MODEL,
        rich_help_panel=MODEL_PANEL,
        help=IMAGE_MODEL_HELP,
    ),
]
StepsOption = Annotated[
    int,
    typer.Option(
        "--steps",
        min=1,
        max=1000,
        metavar="N",
        rich_help_panel=_IMAGE_PANEL,
        help="Number of denoising steps.",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="WIDTHxHEIGHT",
        rich_help_panel=_IMAGE_PANEL,
        show_default="the size that the model was made for",
        help="Size in pixels.",
    ),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        min=0.0,
        max=BOUNDS["guidance"].high,
        metavar="G",
        show_default="the pipeline's own",
        rich_help_panel=_IMAGE_PANEL,
        help="How closely to follow the prompt; 1 turns guidance off.",
    ),
]
NegativeOption = Annotated[
    str | None,
    typer.Option(
        "--negative", metavar="TEXT", rich_help_panel=_IMAGE_PANEL, help="What the image should not show."
    ),
]
ImageOption = Annotated[
    bool, typer.Option("--image", rich_help_panel=_IMAGE_PANEL, help="Make images instead of texts.")
]
InitImageOption = Annotated[
    Path | None,
    typer.Option(
        "--init-image",
        metavar="FILE",
        rich_help_panel=_IMAGE_PANEL,
        help="Start from this image instead of noise.",
    ),
]
StrengthOption = Annotated[
    float | None,
    typer.Option(
        "--strength",
        show_default=f"{STRENGTH:g}",
        min=BOUNDS["strength"].low,
        max=BOUNDS["strength"].high,
        metavar="S",
        rich_help_panel=_IMAGE_PANEL,
        help="How much of the initial image to change. Needs --init-image.",
    ),
]
MetadataOption = Annotated[
    bool,
    typer.Option(
        "--metadata/--no-metadata",
        rich_help_panel=_IMAGE_PANEL,
        help="Write the prompt, the seed and the other settings into the image's file.",
    ),
]
ReuseOption = Annotated[
    float,
    typer.Option(
        "--reuse",
        parser=parse_reuse,
        metavar="N|SHARE",
        rich_help_panel=_IMAGE_PANEL,
        help="Call the worker at every N-th step only, or, with a SHARE below 1, only if its input has changed by "
        "more than this share. Other steps reuse its last output. 1 is exact.",
    ),
]
