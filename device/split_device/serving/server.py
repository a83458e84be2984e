"""An HTTP server for OpenAI's and Anthropic's clients: texts by one language model, images by one image model."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from split_common.errors import SplitError
from split_device.serving import page
from split_device.serving.anthropic.errors import COUNT_PATH, MESSAGES_PATH
from split_device.serving.fields import ApiError
from split_device.serving.guard import Guard, check_key, check_origin
from split_device.serving.http import Handler, json_response, refuse
from split_device.serving.openai.images import Images
from split_device.serving.openai.requests import COMPLETION_PATHS
from split_device.serving.openai.responses.paths import RESPONSES_PATH
from split_device.serving.request_ids import RequestIds
from split_device.serving.text_model import TextModel

IMAGES_PATH = "/v1/images/generations"

#: Methods and paths of all requests for texts.
TEXT_PATHS = [("POST", path) for path in (*COMPLETION_PATHS, RESPONSES_PATH, MESSAGES_PATH, COUNT_PATH)]


class Dialect(Protocol):
    """A format of requests for texts."""

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """What answers which method and path."""


class CompletionServer:
    """Answers requests with the loaded models.

    Args:
        model, images: what is served; None to serve nothing of that kind.
        dialects: the formats of requests to the language model.
        api_keys: the keys of which clients must send one; empty to require none.
        hosts: host names that requests may have, beside those of the loopback.
    """

    def __init__(
        self,
        model: TextModel | None,
        dialects: Sequence[Dialect],
        images: Images | None,
        api_keys: Sequence[str] = (),
        hosts: Sequence[str] = (),
    ) -> None:
        self._text = model
        self._dialects = dialects
        self._images = images
        self._api_keys = api_keys
        self._hosts = hosts
        self._began = int(time.time())

    def app(self) -> ASGIApp:
        handlers = dict.fromkeys(TEXT_PATHS, _not_served("language"))
        for dialect in self._dialects:
            handlers |= dialect.handlers()
        make = self._images.make if self._images is not None else _not_served("image")
        routes = [
            *(self._private(path, handler, method) for (method, path), handler in handlers.items()),
            self._private(IMAGES_PATH, make, "POST"),
            self._private("/v1/models", self._models),
            self._private("/v1/models/{name:path}", self._model),
            self._private("/split", self._split),
            self._private("/version", self._version),
            Route("/health", self._health),
            *page.routes(),
        ]
        # Outermost, so that answers to requests that fail in any way have an id.
        return RequestIds(
            Starlette(
                routes=routes,
                middleware=[Middleware(Guard, self._hosts)],
                exception_handlers=dict.fromkeys((SplitError, HTTPException, ClientDisconnect, Exception), refuse),
            )
        )

    def _private(self, path: str, answer: Handler, method: str = "GET") -> Route:
        """A route that requires the API key."""

        async def authorized(request: Request) -> Response:
            check_origin(request.headers)
            check_key(request.headers, self._api_keys)
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
        served = [each for each in (self._text, self._images) if each is not None]
        traffic = [each.traffic() for each in served]
        return json_response(
            {
                "model": self._text.name if self._text is not None else None,
                "image_model": self._images.name if self._images is not None else None,
                "context": self._text.context if self._text is not None else None,
                "parts": served[0].parts(),
                "defaults": self._text.sampling().facts() if self._text is not None else None,
                "traffic": {name: sum(each.get(name, 0) for each in traffic) for name in traffic[0]},
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

    async def _version(self, _request: Request) -> Response:
        return json_response({"version": importlib.metadata.version("lambda-split")})

    def _names(self) -> list[str]:
        texts = self._text.names if self._text is not None else []
        return texts + ([self._images.name] if self._images is not None else [])

    def _card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._began, "owned_by": "lambda-split"}
        if self._text is not None and name in self._text.names:
            card["max_model_len"] = self._text.context
        return card


def _not_served(kind: str) -> Handler:
    """The handler for a kind of model that is not served."""

    async def answer(_request: Request) -> Response:
        raise ApiError(f"no {kind} model is served here", 404, param="model", code="model_not_found")

    return answer
