"""What a split UNet leaves to the device and what travels, at true shapes without weights; and, with --model, an
image made unsplit and split by each cut and codec: error, bytes and time."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.harness import Relay, arguments, fleet, note, report

CODECS = {"none": "float16", "fp16": "float16", "int8": "int8", "int4": "int4"}
PROMPT = "a photo of the digit seven in red"
MB = 1e6

#: Configurations of the originals' UNets; what is not named is the default of diffusers' class.
SHAPES: dict[str, dict[str, Any]] = {
    "sdxl": {
        "size": 1024,
        "tokens": 77,
        # Its default negative embeddings are zeros, which do not travel.
        "embeddings": 1,
        "config": {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
    },
    "sd15": {
        "size": 512,
        "tokens": 77,
        "embeddings": 2,
        "config": {
            "block_out_channels": [320, 640, 1280, 1280],
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
    },
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of an image")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        note(f"counting: {name}")
        results |= _shares(name, **shape)
    if options.model is not None:
        results |= _images(options.model, options.steps)
    report(results, options.json, "split diffusion")


def _shares(name: str, size: int, tokens: int, embeddings: int, config: dict[str, Any]) -> dict[str, Any]:
    """Of a step with guidance (a batch of 2) in half precision."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from split_common import wire
    from split_common.diffusion.plan import CUTS
    from split_common.diffusion.unet import UNetPlan

    latent, width = size // 8, config["cross_attention_dim"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).half()
        added = {
            "text_embeds": torch.empty(2, 1280, dtype=torch.half),
            "time_ids": torch.empty(2, 6, dtype=torch.half),
        }
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            unet(
                torch.empty(2, 4, latent, latent, dtype=torch.half),
                torch.empty((), dtype=torch.long),
                torch.empty(2, tokens, width, dtype=torch.half),
                added_cond_kwargs=added,
            )
    flops = {module: sum(counts.values()) for module, counts in counter.get_flop_counts().items()}
    plan = UNetPlan(SimpleNamespace(name=name), unet.config)  # type: ignore[arg-type]
    parameters = {key: parameter.numel() for key, parameter in unet.named_parameters()}
    results: dict[str, Any] = {}
    for cut in CUTS:
        split = plan.split(cut)
        first = split.first
        last = f"up_blocks.{plan.levels - first - 1}"
        blocks = [
            *(f"down_blocks.{level}" for level in range(first, plan.levels)),
            "mid_block",
            *(f"up_blocks.{index}" for index in range(plan.levels - first)),
        ]
        of = {key.removeprefix("UNet2DConditionModel."): count for key, count in flops.items()}
        body = sum(of[block] for block in blocks) - of[f"{last}.upsamplers.0"]
        mine = sum(count for key, count in parameters.items() if not plan.in_body(key, split))
        side = latent >> first
        for codec, coded in CODECS.items():
            up = wire.Array(coded, [2, plan.channels[first - 1], side, side]).nbytes + 2 * 2 * plan.embedding  # type: ignore[arg-type]
            down = wire.Array(coded, [2, plan.channels[first], side, side]).nbytes  # type: ignore[arg-type]
            results |= {
                f"{name}.{cut}.{codec}.bytes_up_per_step": up,
                f"{name}.{cut}.{codec}.bytes_down_per_step": down,
            }
        results |= {
            f"{name}.{cut}.device_flops_share": 1 - body / of["Global"],
            f"{name}.{cut}.device_params_share": mine / sum(parameters.values()),
            f"{name}.{cut}.embeddings_bytes": embeddings * tokens * width * 2,
        }
    return results


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
            for codec in CODECS:
                note(f"measuring: cut {cut}, {codec}")
                relay = Relay(address)
                with SplitUNet2DConditionModel.from_pretrained(
                    model, broker=relay.address, cut=cut, codec=codec, dtype="float32"
                ) as unet:
                    timed(unet=unet)
                    relay.up = relay.down = unet.timings.steps = 0
                    image, split_s = timed(unet=unet)
                    error = float(np.square(image - unsplit).mean())
                    results |= {
                        f"toy.{cut}.{codec}.{name}": value
                        for name, value in {
                            "max_abs_diff": float(np.abs(image - unsplit).max()),
                            "psnr_db": float(-10 * np.log10(error)) if error else None,
                            "bytes_up_per_step": relay.up / unet.timings.steps,
                            "bytes_down_per_step": relay.down / unet.timings.steps,
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
