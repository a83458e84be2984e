"""What a split denoiser leaves to the device and what travels, at true shapes without weights; and, with --model,
an image made unsplit and split by each cut, codec and reuse: error, bytes and time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.denoisers import SHAPES, shares
from benchmarks.harness import Relay, arguments, fleet, note, report

PROMPT = "a photo of the digit seven in red"

#: How states travel and are used again, by the names in the results.
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {"codec": "fp16"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "reuse2": {"reuse": 2},
    "reuse3": {"reuse": 3},
    "reuse0.1": {"reuse": 0.1},
    "reuse0.2": {"reuse": 0.2},
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of an image")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in SHAPES:
        note(f"counting: {name}")
        results |= shares(name)
    if options.model is not None:
        results |= _images(options.model, options.steps)
    report(results, options.json, "split diffusion")


def _images(model: Path, steps: int) -> dict[str, Any]:
    """An image of a pipeline, unsplit and split, with its bytes on the wire."""
    import numpy as np
    import torch
    from diffusers import AutoPipelineForText2Image

    from split_device import SplitUNet2DConditionModel

    def timed(**parts: Any) -> tuple[Any, float]:
        pipeline = AutoPipelineForText2Image.from_pretrained(model, dtype=torch.float32, **parts)
        pipeline.set_progress_bar_config(disable=True)
        began = time.perf_counter()
        image = pipeline(
            PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        return image, time.perf_counter() - began

    timed()
    unsplit, unsplit_s = timed()
    results: dict[str, Any] = {}
    for cut, layers in (("A", "2:-2"), ("C", "1:-1")):
        with fleet(model, layers, "--dtype", "float32") as (address, _):
            for name, options in SETTINGS.items():
                note(f"measuring: cut {cut}, {name}")
                relay = Relay(address)
                with SplitUNet2DConditionModel.from_pretrained(
                    model, broker=relay.address, cut=cut, dtype="float32", **options
                ) as unet:
                    timed(unet=unet)
                    relay.up = relay.down = unet.timings.steps = 0
                    image, split_s = timed(unet=unet)
                    error = float(np.square(image - unsplit).mean())
                    results |= {
                        f"toy.{cut}.{name}.{key}": value
                        for key, value in {
                            "max_abs_diff": float(np.abs(image - unsplit).max()),
                            "psnr_db": float(-10 * np.log10(error)) if error else None,
                            "bytes_up_per_step": relay.up / steps,
                            "bytes_down_per_step": relay.down / steps,
                            "calls": unet.timings.steps,
                            "split_s": split_s,
                            "unsplit_s": unsplit_s,
                            "ratio": split_s / unsplit_s,
                        }.items()
                    }
                relay.close()
    return results


if __name__ == "__main__":
    main()
