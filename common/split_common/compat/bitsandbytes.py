"""What is private in bitsandbytes. Written against 0.50."""

from __future__ import annotations

import logging
import sys


def import_bitsandbytes() -> None:
    """Imports bitsandbytes without the kernel that it would fetch from a hub, on CPUs with bfloat16.

    It has code of its own in that kernel's place, and logs a warning.

    Raises:
        ImportError: it is not installed, or cannot be imported.

    Written against bitsandbytes 0.50. If it breaks, look at who imports `kernels` in `backends/cpu/ops.py`.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.addFilter(_is_other)
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
        log.removeFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()
