"""Denoising steps per second of one worker with 1, 2 and 4 devices at once, and of the unsplit UNet."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.denoising import SHAPES, denoise
from benchmarks.harness import arguments, fleet, note, report
from split_common.system.process import passive_threads

DEVICES = (1, 2, 4)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=6, help="number of images of each device")
    parser.add_argument("--steps", type=int, help="denoising steps of an image; default: 10")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="instead, run a random UNet on this device")
    parser.add_argument("--shape", choices=SHAPES, default="sdxl", help="shape of the random UNet")
    options = parser.parse_args()
    passive_threads()
    if options.device:
        results = denoise(options.device, options.shape, options.steps or 30)
        report(results, options.json, f"denoising, {options.shape}")
        return
    options.steps = options.steps or 10
    with tempfile.TemporaryDirectory() as directory:
        from split_device.stress import tiny_unet

        model = options.model or tiny_unet.build(Path(directory) / "unet", 0)
        results = _measure(model, options.images, options.steps, options.size)
    report(results, options.json, f"images of {options.size}x{options.size}, {options.steps} steps")


def _measure(model: Path, images: int, steps: int, size: int) -> dict[str, Any]:
    import torch
    from diffusers import UNet2DConditionModel

    from split_device import SplitUNet2DConditionModel
    from split_device.stress.images import ImageRequest, draw

    def request(unet: Any, number: int) -> ImageRequest:
        drawn = draw(0, 0, number, unet.config)
        fixed = {"num_inference_steps": steps, "num_images_per_prompt": 1, "guidance_scale": 4.0}
        return ImageRequest(drawn.options | fixed | {"width": size, "height": size}, number)

    inner = model / "unet"
    unsplit = UNet2DConditionModel.from_pretrained(inner if inner.is_dir() else model, dtype=torch.float32)
    unsplit.eval().requires_grad_(False)
    request(unsplit, 0).run(unsplit)
    began = time.perf_counter()
    wanted = [request(unsplit, number).run(unsplit) for number in range(images)]
    results: dict[str, Any] = {"unsplit.steps_per_s": images * steps / (time.perf_counter() - began)}
    difference = 0.0
    with fleet(model, "1:-1", "--dtype", "float32") as (address, _), contextlib.ExitStack() as stack:
        for count in DEVICES:
            note(f"measuring: {count} devices")
            unets = [
                stack.enter_context(
                    SplitUNet2DConditionModel.from_pretrained(model, broker=address, cut="C", dtype="float32")
                )
                for _ in range(count)
            ]
            for unet in unets:
                request(unet, 0).run(unet)
            outputs: dict[tuple[int, int], torch.Tensor] = {}

            def make(index: int, unet: Any, outputs: dict[tuple[int, int], torch.Tensor]) -> None:
                for number in range(images):
                    outputs[index, number] = request(unet, number).run(unet)

            threads = [threading.Thread(target=make, args=(*each, outputs)) for each in enumerate(unets)]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            results[f"{count}.steps_per_s"] = count * images * steps / (time.perf_counter() - began)
            for (_, number), output in outputs.items():
                share = (output - wanted[number]).abs().max() / wanted[number].abs().max()
                difference = max(difference, float(share))
            assert len(outputs) == count * images
    return results | {"max_difference": difference}


if __name__ == "__main__":
    main()
