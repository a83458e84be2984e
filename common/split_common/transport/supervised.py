"""Where errors end: each thread of a transport has one place, at its top, that counts them and goes on.

The promise is that no message, answer or handler ends a thread, whatever is in it. A message that breaks the
protocol is counted by the name of its error (`SplitError`), a handler that fails as `HandlerError`. Anything else
is unforeseen: it is counted as `failures` and logged with its traceback.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

from split_common.errors import SplitError

log = logging.getLogger(__name__)

#: Seconds before a thread begins anew after an unforeseen failure.
PAUSE = 0.1


def count_dropped(counters: Counter[str], error: SplitError) -> None:
    """Counts a message that was refused, by type of error. Logs the 1st, 2nd, 4th…: a flood must not fill disks."""
    name = type(error).__name__
    counters[name] += 1
    if counters[name].bit_count() == 1:
        log.warning("dropped a message (%s, %d so far): %s", name, counters[name], error)


def count_failure(counters: Counter[str], what: str) -> None:
    """Counts an unforeseen failure, and logs the exception that is being handled. `what` names what failed."""
    counters["failures"] += 1
    log.exception("%s failed, and goes on", what)


def supervised(
    turn: Callable[[], object], counters: Counter[str], what: str, closing: threading.Event, pause: float = PAUSE
) -> None:
    """Runs one turn of a thread's loop; no error gets out.

    Args:
        turn: what the thread does.
        counters: where its errors are counted.
        what: names it in the log.
        closing: ends the pause of `pause` seconds that follows an unforeseen failure.
    """
    try:
        turn()
    except SplitError as error:
        count_dropped(counters, error)
    except Exception:
        count_failure(counters, what)
        closing.wait(pause)
