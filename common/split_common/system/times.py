"""Times as programs read them."""

from __future__ import annotations

import time


def iso_time(seconds: float | None) -> str | None:
    """A time in ISO 8601, in UTC, with milliseconds, e.g. 2026-01-31T09:05:00.250Z; None for None.

    Args:
        seconds: since the epoch.
    """
    if seconds is None:
        return None
    milliseconds = round(seconds * 1000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{whole}.{milliseconds % 1000:03d}Z"
