"""An HTTP server for OpenAI's clients: completions by one split language model, images by one split image model."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from split_common.errors import SplitError
from split_device.openai import page
from split_device.openai.completions import Completions
from split_device.openai.http import refuse
from split_device.openai.images import Images
from split_device.openai.requests import COMPLETION_PATHS, ApiError

#: Host names that requests may have. Others are refused: a web page may have rebound its own name to this machine.
HOSTS = ("127.0.0.1", "localhost")

IMAGES_PATH = "/v1/images/generations"

RouteHandler = Callable[[Request], Awaitable[Response]]


class CompletionServer:
    """Answers requests with the loaded models.

    Args:
        completions, images: what is served; None to serve nothing of that kind.
        api_key: the bearer token that clients must send; None to require none.
    """

    def __init__(self, completions: Completions | None, images: Images | None, api_key: str | None) -> None:
        self._completions = completions
        self._images = images
        self._api_key = api_key
        self._began = int(time.time())

    def app(self) -> Starlette:
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
        return Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))],
            exception_handlers={SplitError: refuse, HTTPException: refuse, Exception: refuse},
        )

    def _private(self, path: str, answer: RouteHandler, method: str = "GET") -> Route:
        """A route that requires the API key."""

        async def authorized(request: Request) -> Response:
            origin = request.headers.get("origin")
            if origin is not None and origin.partition("://")[2] != request.headers["host"]:
                # A browser sends the requests of any page, and only withholds the answer from it.
                raise ApiError("requests from pages of other origins are refused", 403)
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self._api_key is not None and not hmac.compare_digest(given.encode(), self._api_key.encode()):
                raise ApiError("the API key is wrong or missing", 401, code="invalid_api_key")
            try:
                return await answer(request)
            except asyncio.CancelledError:
                raise ApiError("the server is shutting down", 503, type_="server_error") from None

        return Route(path, authorized, methods=[method])

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _split(self, _request: Request) -> Response:
        """Which layers run where, and what left this device since the start, summed over all requests."""
        served = [each for each in (self._completions, self._images) if each is not None]
        traffic = [each.traffic() for each in served]
        return JSONResponse(
            {
                "model": self._completions.name if self._completions is not None else None,
                "image_model": self._images.name if self._images is not None else None,
                "parts": served[0].parts(),
                "traffic": {name: sum(each[name] for each in traffic) for name in traffic[0]},
            }
        )

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._names()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._names():
            raise ApiError(
                f"the models here: {', '.join(self._names())}", 404, param="model", code="model_not_found"
            )
        return JSONResponse(self._card(name))

    def _names(self) -> list[str]:
        return [each.name for each in (self._completions, self._images) if each is not None]

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "lambda-split"}


def _not_served(kind: str) -> RouteHandler:
    """The handler for a kind of model that is not served."""

    async def answer(_request: Request) -> Response:
        raise ApiError(f"no {kind} model is served here", 404, param="model", code="model_not_found")

    return answer
