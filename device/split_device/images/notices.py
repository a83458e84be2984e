"""What a pipeline does without a word: prompts that it cuts off, and images that it makes black."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from split_device.images.files import PARAMETERS, note
from split_device.images.settings import ImageSettings


def describe(image: Any, pipeline: Any, prompt: str, settings: ImageSettings, more: dict[str, Any]) -> None:
    """Adds the settings to a made image, in the form that other programs for diffusion models write and read.

    Args:
        more: further arguments of the pipeline's call.
    """
    guidance = settings.guidance if settings.guidance is not None else getattr(pipeline, "guidance_scale", None)
    facts = {
        "Steps": settings.steps,
        "Sampler": type(pipeline.scheduler).__name__,
        "CFG scale": guidance,
        "Seed": settings.seed,
        "Size": f"{image.width}x{image.height}",
        "Denoising strength": more.get("strength"),
        "Version": "lambda-split",
    }
    lines = [prompt]
    if settings.negative is not None:
        lines.append(f"Negative prompt: {settings.negative}")
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    image.info[PARAMETERS] = "\n".join(lines)


def add_notices(image: Any, pipeline: Any, output: Any, prompt: str, settings: ImageSettings) -> None:
    """Adds notes about a prompt that was cut off, and about a black image, to a made image."""
    for what, text in (("prompt", prompt), ("negative prompt", settings.negative)):
        if text and (lost := cut_off(pipeline, text)):
            note(image, f"the text encoders have no room for the end of the {what}, which was cut off: {lost!r}")
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        note(image, "the image is black, because the pipeline's safety checker flagged it as unsafe")


def cut_off(pipeline: Any, text: str) -> str:
    """The end of a text that none of the pipeline's text encoders has room for; empty if there is none."""
    return min(_ends(pipeline, text), key=len, default="")


def _ends(pipeline: Any, text: str) -> Iterator[str]:
    """What each text encoder cuts off."""
    for suffix in ("", "_2", "_3"):
        tokenizer, encoder = (getattr(pipeline, name + suffix, None) for name in ("tokenizer", "text_encoder"))
        if tokenizer is None or encoder is None:
            continue
        ids = tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]
        room = _room(pipeline, tokenizer) - tokenizer.num_special_tokens_to_add()
        yield tokenizer.decode(ids[room:], skip_special_tokens=True).strip()


def _room(pipeline: Any, tokenizer: Any) -> int:
    """Number of tokens that a pipeline gives a text encoder: CLIP's own, or a default of the pipeline's call."""
    if "T5" not in type(tokenizer).__name__:
        return int(tokenizer.model_max_length)
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    return int(parameter.default) if parameter is not None else int(tokenizer.model_max_length)
