"""Images in OpenAI's format, by an image model."""

from __future__ import annotations

import asyncio
import base64
import functools
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from split_common.errors import ConfigError
from split_device.images.files import image_bytes, notes
from split_device.images.settings import DRAWN_SEED_BITS, ImageSettings
from split_device.serving.answering import comment, event
from split_device.serving.fields import ApiError, check_model
from split_device.serving.http import (
    CLIENT_CLOSED_REQUEST,
    api_error,
    json_response,
    read_json,
    unless_disconnected,
)
from split_device.serving.openai.image_requests import ImageBody, parse_image
from split_device.serving.request_ids import request_id
from split_device.serving.streaming import Notice
from split_device.sessions.notices import OnNotice

if TYPE_CHECKING:
    from split_device.images.pipeline import ImagePipeline


class Images:
    """Makes images with a loaded model.

    Args:
        name: what clients call the model.
        at_once: the number of images made at once; further ones wait.
        texts: names of the language model that is served beside it, for messages.
    """

    def __init__(self, pipeline: ImagePipeline, name: str, at_once: int, texts: Sequence[str] = ()) -> None:
        self.name = name
        self._texts = texts
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

    async def _image(
        self, prompt: str, settings: ImageSettings, id_: str, index: int, on_notice: OnNotice | None = None
    ) -> Any:
        """Makes an image as soon as one may start; until then it has no thread."""
        async with self._slots:
            generation = self._pipeline.start(prompt, settings, id_, index, on_notice)
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
                check_model(body.model, [self.name], self._texts, "texts")
            chosen = self._settings(body)
            if body.stream:
                return StreamingResponse(
                    self._events(body, chosen, request_id(request)), media_type="text/event-stream"
                )
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
        entries = zip(made, chosen, strict=True)
        data = await asyncio.to_thread(lambda: [_entry(image, settings, body) for image, settings in entries])
        return json_response({**_header(made[0], body), "data": data})

    async def _events(self, body: ImageBody, chosen: list[ImageSettings], id_: str) -> AsyncIterator[str]:
        """An event for each image as soon as it is made, and comments while one waits for a worker."""
        happened: asyncio.Queue[Notice | int] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def say(text: str) -> None:
            loop.call_soon_threadsafe(happened.put_nowait, Notice(text))

        def note(index: int, image: asyncio.Task[Any]) -> None:
            if not image.cancelled():
                # Raised below, unless another one was before: asyncio need not log it.
                image.exception()
            happened.put_nowait(index)

        images = [
            asyncio.create_task(self._image(body.prompt, settings, id_, index, say))
            for index, settings in enumerate(chosen)
        ]
        for index, image in enumerate(images):
            image.add_done_callback(functools.partial(note, index))
        left = len(images)
        try:
            while left:
                found = await happened.get()
                if isinstance(found, Notice):
                    yield comment(found)
                    continue
                left -= 1
                made = images[found].result()
                entry = await asyncio.to_thread(_entry, made, chosen[found], body)
                header = _header(made, body)
                kind = "image_generation.completed"
                about = {"type": kind, "index": found, "created_at": header.pop("created")}
                yield event({**about, **header, **entry}, kind)
        except Exception as error:
            yield event({"error": api_error(error).fields()}, "error")
        finally:
            for image in images:
                image.cancel()


def _header(image: Any, body: ImageBody) -> dict[str, Any]:
    return {
        "created": int(time.time()),
        "size": f"{image.width}x{image.height}",
        "output_format": body.output_format,
    }


def _entry(image: Any, settings: ImageSettings, body: ImageBody) -> dict[str, Any]:
    """An image as one object. Encoding it takes a while."""
    content = image_bytes(image, body.output_format.upper(), metadata=body.metadata)
    return {
        "b64_json": base64.b64encode(content).decode(),
        "seed": settings.seed,
        "steps": settings.steps,
        "notes": notes(image),
    }
