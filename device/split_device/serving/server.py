"""An HTTP server for OpenAI's clients: completions by one split language model, images by one split image model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from split_common.errors import SplitError
from split_device.serving import page
from split_device.serving.fields import ApiError
from split_device.serving.guard import Guard, check_key, check_origin
from split_device.serving.http import json_response, refuse
from split_device.serving.openai.completions import Completions
from split_device.serving.openai.images import Images
from split_device.serving.openai.requests import COMPLETION_PATHS
from split_device.serving.request_ids import RequestIds

IMAGES_PATH = "/v1/images/generations"

RouteHandler = Callable[[Request], Awaitable[Response]]


class CompletionServer:
    """Answers requests with the loaded models.

    Args:
        completions, images: what is served; None to serve nothing of that kind.
        api_key: the bearer token that clients must send; None to require none.
        hosts: host names that requests may have, beside those of the loopback.
    """

    def __init__(
        self,
        completions: Completions | None,
        images: Images | None,
        api_key: str | None,
        hosts: Sequence[str] = (),
    ) -> None:
        self._completions = completions
        self._images = images
        self._api_key = api_key
        self._hosts = hosts
        self._began = int(time.time())

    def app(self) -> ASGIApp:
        complete = self._completions.complete if self._completions is not None else _not_served("language")
        make = self._images.make if self._images is not None else _not_served("image")
        routes = [
            *(self._private(path, complete, "POST") for path in COMPLETION_PATHS),
            self._private(IMAGES_PATH, make, "POST"),
            self._private("/v1/models", self._models),
            self._private("/v1/models/{name:path}", self._model),
            self._private("/split", self._split),
            Route("/health", self._health),
            *page.routes(),
        ]
        # Outermost, so that answers to requests that fail in any way have an id.
        return RequestIds(
            Starlette(
                routes=routes,
                middleware=[Middleware(Guard, self._hosts)],
                exception_handlers={SplitError: refuse, HTTPException: refuse, Exception: refuse},
            )
        )

    def _private(self, path: str, answer: RouteHandler, method: str = "GET") -> Route:
        """A route that requires the API key."""

        async def authorized(request: Request) -> Response:
            check_origin(request.headers)
            check_key(request.headers, self._api_key)
            try:
                return await answer(request)
            except asyncio.CancelledError:
                raise ApiError("the server is shutting down", 503, type_="server_error") from None

        return Route(path, authorized, methods=[method])

    async def _health(self, _request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _split(self, _request: Request) -> Response:
        """Which layers run where, how tokens are chosen unless a request says it, and what left this device.

        What left is counted since the start, and summed over all requests.
        """
        served = [each for each in (self._completions, self._images) if each is not None]
        traffic = [each.traffic() for each in served]
        return json_response(
            {
                "model": self._completions.name if self._completions is not None else None,
                "image_model": self._images.name if self._images is not None else None,
                "context": self._completions.context if self._completions is not None else None,
                "parts": served[0].parts(),
                "defaults": self._completions.sampling().facts() if self._completions is not None else None,
                "traffic": {name: sum(each[name] for each in traffic) for name in traffic[0]},
            }
        )

    async def _models(self, _request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card(name) for name in self._names()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._names():
            raise ApiError(
                f"the models here: {', '.join(self._names())}", 404, param="model", code="model_not_found"
            )
        return json_response(self._card(name))

    def _names(self) -> list[str]:
        texts = self._completions.names if self._completions is not None else []
        return texts + ([self._images.name] if self._images is not None else [])

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "lambda-split"}


def _not_served(kind: str) -> RouteHandler:
    """The handler for a kind of model that is not served."""

    async def answer(_request: Request) -> Response:
        raise ApiError(f"no {kind} model is served here", 404, param="model", code="model_not_found")

    return answer
