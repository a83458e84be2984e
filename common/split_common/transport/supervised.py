"""Where errors end: at the top of each thread of a transport, which counts them and continues.

No message, answer or handler ends a thread, whatever it holds or raises. A message that breaks the protocol is
counted by the name of its error (`SplitError`), a failing handler as `HandlerError`, and anything unforeseen as
`failures`.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from split_common.errors import SplitError

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


def count_dropped(counters: Counter[str], error: SplitError) -> None:
    """Counts a dropped message by type of error. Logs the 1st, 2nd, 4th…, so a flood does not fill the disk."""
    name = type(error).__name__
    counters[name] += 1
    if counters[name].bit_count() == 1:
        log.warning("dropped a message (%s, %d so far): %s", name, counters[name], error)


def handled(counters: Counter[str], call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
    """Calls a handler. Returns None if it fails, and counts the failure."""
    try:
        return call(*args, **kwargs)
    except SplitError as error:
        count_dropped(counters, error)
    except Exception:
        _count(counters, "HandlerError", "a message handler failed")
    return None


class Supervisor:
    """The top of the threads of a link or broker.

    Args:
        name: of the link or broker, for the log.
        counters: where errors are counted.
        closing: ends pauses when it is set.
        pause: seconds to wait after a failure, so that a repeated one does not keep a processor busy.
    """

    def __init__(self, name: str, counters: Counter[str], closing: threading.Event, pause: float = 0.05) -> None:
        self._name = name
        self._counters = counters
        self._closing = closing
        self._pause = pause

    def run(self, act: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs) -> bool:
        """Does something once. Returns False, after a pause, if it fails; does not raise."""
        try:
            act(*args, **kwargs)
        except SplitError as error:
            count_dropped(self._counters, error)
        except Exception:
            _count(self._counters, "failures", f"{self._name} failed, and goes on")
        else:
            return True
        if self._pause:
            self._closing.wait(self._pause)
        return False

    def start(self, loop: Callable[[], object], name: str) -> threading.Thread:
        """Starts a thread that runs a loop until it returns. After a failure it runs again, if not closing."""

        def again_and_again() -> None:
            while not self.run(loop) and not self._closing.is_set():
                pass

        thread = threading.Thread(target=again_and_again, name=name, daemon=True)
        thread.start()
        return thread


def _count(counters: Counter[str], name: str, message: str) -> None:
    """Counts the exception that is being handled. Logs the 1st, 2nd, 4th… of its kind, with a traceback."""
    counters[name] += 1
    if counters[name].bit_count() == 1:
        log.exception("%s (%d so far)", message, counters[name])
