"""The chat page: its files, and the headers that restrict what a browser does with them."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_FILES = Path(__file__).parent / "static"

#: The page loads and runs nothing from elsewhere, and cannot be framed by another page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The page at `/`, and its files."""
    return [_route("/", "index.html"), _route("/chat.css"), _route("/chat.js")]


def _route(path: str, name: str | None = None) -> Route:
    async def send(_request: Request) -> Response:
        return FileResponse(_FILES / (name or path[1:]), headers=_HEADERS)

    return Route(path, send)
