"""The `lambda-split image` command."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from split_common.cli.options import (
    DEFAULT_BROKER,
    MODEL_PANEL,
    BrokerOption,
    DtypeOption,
    JsonOption,
    KeysOption,
    MemberOption,
    TimeoutOption,
)
from split_common.console import emit_json, stderr
from split_common.errors import ConfigError
from split_common.files import write_private
from split_common.fleet import load_fleet
from split_common.process import exit_on_sigterm, passive_threads
from split_common.transport import connect
from split_device.diffusion.options import (
    IMAGE_MODEL,
    CodecOption,
    CutOption,
    GuidanceOption,
    ImageSeedOption,
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
from split_device.options import PatienceOption

#: Of a seed that is drawn: short enough to be typed again.
SEED_BITS = 32


def image(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the image should show.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to: a .png, .jpg or .webp file, which is replaced."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR",
            envvar=IMAGE_MODEL,
            rich_help_panel=MODEL_PANEL,
            help="Directory of a pipeline in diffusers' safetensors format.",
        ),
    ] = None,
    broker: BrokerOption = DEFAULT_BROKER,
    steps: StepsOption = 20,
    seed: ImageSeedOption = None,
    size: SizeOption = None,
    guidance: GuidanceOption = None,
    negative: NegativeOption = None,
    init_image: Annotated[
        Path | None, typer.Option("--init-image", metavar="FILE", help="Begin with this image, not with noise.")
    ] = None,
    strength: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="S", help="How much to change of the image begun with.")
    ] = 0.6,
    cut: CutOption = "C",
    codec: CodecOption = "none",
    reuse: ReuseOption = 1,
    dtype: DtypeOption = "auto",
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    patience: PatienceOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Make an image by a split diffusion model.

    Needs a running `lambda-split broker`, or Redis, and a `lambda-split worker --cut …` that serves the same model.
    Ctrl-C ends it, and writes nothing.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    check_output(output)
    if init_image is not None and size is not None:
        raise ConfigError("--init-image and --size do not go together: the image has a size")
    if init_image is not None and int(steps * strength) < 1:
        raise ConfigError(f"--strength {strength:g} changes nothing in {steps} steps")
    # One that is drawn is told, so that the image can be made again.
    seed = secrets.randbits(SEED_BITS) if seed is None else seed
    directory = pipeline_directory(model)
    settings = image_settings(directory, steps, seed, size, guidance, negative)
    need_diffusers()
    passive_threads()
    fleet = load_fleet(keys)
    connect(broker, fleet, fleet.identity("device", member))
    more = {"image": _read_image(init_image), "strength": strength} if init_image is not None else {}

    from split_device.diffusion.kinds import load_denoiser
    from split_device.diffusion.painter import Painter

    with (
        exit_on_sigterm(),
        load_denoiser(
            directory,
            broker=broker,
            cut=cut,
            codec=codec,
            reuse=reuse,
            dtype=dtype,
            keys=keys,
            member=member,
            timeout=timeout,
            patience=patience,
        ) as denoiser,
    ):
        painter = Painter(directory, denoiser, from_image=init_image is not None)
        began = time.perf_counter()
        with step_progress(steps, json) as advance:
            made = painter.paint(prompt, settings, advance, **more)
        seconds = time.perf_counter() - began
        write_private(output.absolute(), image_bytes(made, image_format(output.name)))
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
                    "timings_ms": denoiser.timings.per_step_ms(),
                    "traffic": denoiser.traffic,
                }
            )
        else:
            facts = f"{made.width}x{made.height}, seed {seed}, {seconds:.1f} s, {calls} calls of the worker"
            stderr.print(f"{output}: {facts}", soft_wrap=True)


def _read_image(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read as an image: {reason}") from None
