"""Pictures of a pipeline, unsplit and split with each cut and codec: their differences, bytes and times."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import counted, fleet, note

PROMPTS = (
    "a photo of the digit seven in red",
    "a photo of the digit two in green",
    "a photo of the digit zero in blue",
    "a photo of the digit nine in yellow",
    "a photo of the digit five in purple",
)

#: Options of the codec and of reuse, by their names in the results.
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

#: The cuts, and the `--layers` of a worker for each, for UNets with three or four levels.
CUTS = {"A": "2:-2", "C": "1:-1"}


def compare(model: Path, cuts: Sequence[str], steps: int, count: int) -> dict[str, Any]:
    """Results `toy.CUT.SETTING.…`; bytes, calls and seconds are means over `count` pictures."""
    import torch
    from diffusers import AutoPipelineForText2Image

    from split_device import SplitUNet2DConditionModel

    pipeline = AutoPipelineForText2Image.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    # Frozen like the parts of the split UNet: torch rounds differently if weights require gradients.
    whole = pipeline.unet.requires_grad_(False)

    def make(unet: Any) -> tuple[Any, float]:
        """The pictures `[count, height, width, 3]`, from 0 to 1, and the mean seconds of one."""
        import numpy as np

        pipeline.unet = unet
        began = time.perf_counter()
        pictures = [
            pipeline(
                PROMPTS[seed % len(PROMPTS)],
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images[0]
            for seed in range(count)
        ]
        return np.stack(pictures), (time.perf_counter() - began) / count

    make(whole)
    results: dict[str, Any] = {}
    for cut in cuts:
        with fleet(model, CUTS[cut], "--dtype", "float32") as (address, _):
            for name, options in SETTINGS.items():
                note(f"measuring: cut {cut}, {name}")
                unsplit, unsplit_s = make(whole)
                with (
                    counted(address) as (proxy, before),
                    SplitUNet2DConditionModel.from_pretrained(
                        model, broker=before, cut=cut, dtype="float32", **options
                    ) as unet,
                ):
                    make(unet)
                    proxy.up = proxy.down = 0
                    unet.timings.reset()
                    split, split_s = make(unet)
                    results |= {
                        f"toy.{cut}.{name}.{key}": value
                        for key, value in {
                            **dict(_differences(split, unsplit)),
                            "bytes_up_per_step": proxy.up / (steps * count),
                            "bytes_down_per_step": proxy.down / (steps * count),
                            "calls": unet.timings.steps / count,
                            "split_s": split_s,
                            "unsplit_s": unsplit_s,
                            "ratio": split_s / unsplit_s,
                        }.items()
                    }
    return results


def _differences(pictures: Any, wanted: Any) -> Iterator[tuple[str, float | None]]:
    """Largest difference of a value, PSNR in dB (None if all are equal), and mean SSIM, over all pictures."""
    import numpy as np
    from skimage.metrics import structural_similarity

    error = float(np.square(pictures - wanted).mean())
    yield "max_abs_diff", float(np.abs(pictures - wanted).max())
    yield "psnr_db", -10 * math.log10(error) if error else None
    likeness = [
        structural_similarity(*pair, channel_axis=-1, data_range=1.0) for pair in zip(pictures, wanted, strict=True)
    ]
    yield "ssim", float(np.mean(likeness))
