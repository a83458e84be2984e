"""Objects that a forked child must not use: it has no threads of its parent's, and shares its sockets and files."""

from __future__ import annotations

import os

from split_common.errors import ForkedProcess


class Birthplace:
    """The process that made an object.

    Args:
        what: the object, for messages, e.g. "the model".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is another process, forked from that one."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raises ForkedProcess in a process that was forked from that one."""
        if self.is_elsewhere:
            raise ForkedProcess(
                f"{self._what} belongs to process {self._pid}, from which this one was forked: open it after the "
                'fork, in each process, or start processes by the method "spawn" of multiprocessing'
            )
