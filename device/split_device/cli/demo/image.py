"""`lambda-split demo --image`: a sheet of small pictures made by a split UNet, and what left the device."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from split_common.errors import ConfigError
from split_common.models.split import DEFAULT_CUT
from split_common.system.console import emit_json, stderr
from split_common.system.outputs import check_output, write_output
from split_common.system.process import passive_threads
from split_device.cli.demo.fleet import running_fleet

#: The trained toy SDXL in a clone of the repository; wheels do not contain it.
DIGITS_MODEL = Path(__file__).parents[4] / "examples" / "digits-sdxl"

#: The digits and colours of its training: the columns and rows of the sheet.
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")

#: Denoising steps of the sheet.
DEMO_STEPS = 20

#: Seed of the sheet.
DEMO_SEED = 0

#: Difference between two neighbouring shades of a colour that has 8 bits, on a scale from 0 to 1.
SHADE = 1 / 255

#: Bytes of a megabyte.
MB = 1e6

#: Factor by which the sheet enlarges pictures.
ENLARGEMENT = 2


def image_demo(output: Path, json: bool) -> None:
    """Makes the sheet twice, unsplit and split, and prints a comparison.

    Raises:
        ConfigError: the model is missing, or the sheet cannot be written.
    """
    if not DIGITS_MODEL.is_dir():
        raise ConfigError(
            f"{DIGITS_MODEL} is missing: the model comes with a clone of the repository, not with the package; "
            "run `make demo-image` in a clone"
        )
    if output.suffix.lower() != ".png":
        raise ConfigError(f"invalid output {str(output)!r}: expected a .png file")
    check_output(output)
    passive_threads()
    with running_fleet(["--model", str(DIGITS_MODEL), "--cut", DEFAULT_CUT, "--dtype", "float32"]) as fleet:
        import torch

        from split_device.models.unet import SplitUNet2DConditionModel

        pipeline = _load(DIGITS_MODEL)
        parameters = _parameters(pipeline.unet)
        unsplit, unsplit_s = _make(pipeline, "unsplit")
        with SplitUNet2DConditionModel.from_pretrained(
            DIGITS_MODEL, broker=fleet.address, cut=DEFAULT_CUT, dtype="float32"
        ) as unet:
            pipeline.unet = unet
            before, opened = unet.traffic, unet.timings.steps
            split, split_s = _make(pipeline, "split")
            after, calls = unet.traffic, unet.timings.steps - opened
            seen = fleet.last_routed()
    sheet = _sheet(split)
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    write_output(output, content.getvalue())
    facts = {
        "output": str(output.absolute()),
        "images": len(split),
        "steps": calls,
        "max_abs_diff": float(torch.abs(split - unsplit).max()),
        "split_s": split_s,
        "unsplit_s": unsplit_s,
        "ratio": split_s / unsplit_s,
        "bytes_sent": after["bytes_sent"] - before["bytes_sent"],
        "bytes_received": after["bytes_received"] - before["bytes_received"],
        "device_params_share": _parameters(unet) / parameters,
        "broker_saw": seen,
    }
    if json:
        emit_json(facts)
    else:
        _print_facts(facts)


def _load(path: Path) -> Any:
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    # Frozen like the parts of the split UNet: torch rounds differently if weights require gradients.
    pipeline.unet.requires_grad_(False)
    return pipeline


def _make(pipeline: Any, how: str) -> tuple[Any, float]:
    """The pictures `[n, 3, height, width]`, from 0 to 1, and the time they took, in seconds."""
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("step {task.completed}/{task.total}")
    with Progress(*columns, TimeElapsedColumn(), console=stderr) as bar:
        task = bar.add_task(f"{len(DIGITS) * len(COLOURS)} images, {how}", total=DEMO_STEPS)

        def advance(_pipeline: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            bar.advance(task)
            return values

        began = time.perf_counter()
        pictures = pipeline(
            [f"a photo of the digit {digit} in {colour}" for colour in COLOURS for digit in DIGITS],
            num_inference_steps=DEMO_STEPS,
            generator=torch.Generator().manual_seed(DEMO_SEED),
            output_type="pt",
            callback_on_step_end=advance,
        ).images
        return pictures, time.perf_counter() - began


def _parameters(unet: Any) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


def _sheet(pictures: Any) -> Any:
    """The pictures side by side, as a Pillow image."""
    from PIL import Image

    rows = pictures.unflatten(0, (len(COLOURS), len(DIGITS)))
    pixels = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    sheet = Image.fromarray((pixels * 255).round().byte().numpy())
    return sheet.resize((sheet.width * ENLARGEMENT, sheet.height * ENLARGEMENT), Image.Resampling.LANCZOS)


def _print_facts(facts: dict[str, Any]) -> None:
    for line in (
        f"{facts['images']} images in {facts['split_s']:.1f} s, unsplit in {facts['unsplit_s']:.1f} s; "
        f"largest difference of a pixel {facts['max_abs_diff']:.1g} on a scale from 0 to 1 "
        f"(one shade of 256 is {SHADE:.1g})",
        f"left this process: the prompts' embeddings once, and states at each of {facts['steps']} steps, "
        f"{facts['bytes_sent'] / MB:.1f} MB in all; {facts['bytes_received'] / MB:.1f} MB came back",
        "stayed here: prompts, text encoders, noise, scheduler, VAE, images, "
        f"and {facts['device_params_share']:.0%} of the UNet's parameters",
        "what the broker saw of the last step, the body sealed between device and worker:",
        *(f"  {line}" for line in facts["broker_saw"]),
        "the worker decrypts what it computes on: whoever runs it can find out prompts and images",
    ):
        stderr.print(line, soft_wrap=True)
    print(facts["output"], flush=True)
