"""The chat page: its files, and the headers that restrict what a browser does with them."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = Path(__file__).parent / "static"

#: What the page consists of, by the ending of a file's name.
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".md": "text/plain",
    ".LICENSE": "text/plain",
}

#: The page loads and runs nothing from elsewhere, and cannot be framed by another page. What it shows of a model's
#: Markdown has passed DOMPurify, whose policy is the only one by which a text becomes HTML.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The page at `/`, and its files."""
    files = sorted(path for path in _FILES.rglob("*") if path.suffix in _MEDIA_TYPES)
    return [
        _route("/", _FILES / "index.html"),
        *(_route(f"/{path.relative_to(_FILES).as_posix()}", path) for path in files),
    ]


def _route(address: str, file: Path) -> Route:
    async def send(_request: Request) -> Response:
        # Whole, so that no header of a request has to be understood.
        return Response(file.read_bytes(), headers=_HEADERS, media_type=_MEDIA_TYPES[file.suffix])

    return Route(address, send)
