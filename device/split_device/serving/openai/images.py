"""Images in OpenAI's format, by an image model."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from split_common.errors import ConfigError
from split_device.images.files import image_bytes, notes
from split_device.images.settings import DRAWN_SEED_BITS, ImageSettings
from split_device.serving.fields import ApiError, check_model
from split_device.serving.http import CLIENT_CLOSED_REQUEST, json_response, read_json, unless_disconnected
from split_device.serving.openai.image_requests import ImageBody, parse_image
from split_device.serving.request_ids import request_id

if TYPE_CHECKING:
    from split_device.images.pipeline import ImagePipeline


class Images:
    """Makes images with a loaded model.

    Args:
        name: what clients call the model.
        at_once: the number of images made at once; further ones wait.
    """

    def __init__(self, pipeline: ImagePipeline, name: str, at_once: int) -> None:
        self.name = name
        self._slots = asyncio.Semaphore(at_once)
        self._pipeline = pipeline

    def parts(self) -> list[dict[str, Any]]:
        """Which blocks run where."""
        split = self._pipeline.denoiser.split
        return [
            {"name": "head", "where": "device", "first": 0, "last": split.first},
            {"name": "body", "where": "worker", "first": split.first, "last": split.last},
            {"name": "tail", "where": "device", "first": split.last, "last": split.layers},
        ]

    def traffic(self) -> dict[str, int]:
        """What left this device since the start, summed over all requests."""
        traffic = self._pipeline.denoiser.traffic
        return {
            "steps": self._pipeline.denoiser.timings.steps,
            "bytes_sent": traffic["bytes_sent"],
            "bytes_received": traffic["bytes_received"],
        }

    async def _image(self, prompt: str, settings: ImageSettings, id_: str, index: int) -> Any:
        """Makes an image as soon as one may start; until then it has no thread."""
        async with self._slots:
            generation = self._pipeline.start(prompt, settings, id_, index)
            try:
                return await asyncio.wrap_future(generation.future)
            finally:
                generation.cancel()

    def _settings(self, body: ImageBody) -> list[ImageSettings]:
        """The settings of each image. Raises ApiError for a size that the model cannot make."""
        try:
            chosen = body.settings(secrets.randbits(DRAWN_SEED_BITS) if body.seed is None else body.seed)
            self._pipeline.check(chosen[0])
        except ConfigError as error:
            raise ApiError(str(error), param="size") from None
        return chosen

    async def make(self, request: Request) -> Response:
        """Answers a request. Raises ApiError, and other errors that `api_error` reports to the client."""
        images: list[asyncio.Task[Any]] = []
        try:
            body = parse_image(await read_json(request))
            if body.model is not None:
                check_model(body.model, [self.name])
            chosen = self._settings(body)
            images += [
                asyncio.create_task(self._image(body.prompt, settings, request_id(request), index))
                for index, settings in enumerate(chosen)
            ]
            made = await unless_disconnected(request, asyncio.gather(*images))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            for image in images:
                image.cancel()
        data = await asyncio.to_thread(_encoded, made, body.output_format.upper(), body.metadata)
        return json_response(
            {
                "created": int(time.time()),
                "size": f"{made[0].width}x{made[0].height}",
                "output_format": body.output_format,
                "data": [
                    {"b64_json": content, "seed": settings.seed, "steps": settings.steps, "notes": notes(image)}
                    for content, settings, image in zip(data, chosen, made, strict=True)
                ],
            }
        )


def _encoded(images: list[Any], format_: str, metadata: bool) -> list[str]:
    return [base64.b64encode(image_bytes(image, format_, metadata=metadata)).decode() for image in images]
