"""An encrypted temporary file, for what memory should not hold."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import deque

from split_common.channel import SUITES, Box, preferred_suites

#: Bytes of plaintext in a slot, at most.
SLOT_BYTES = 1024 * 1024

_LABEL = b"lambda-split spilled states"


class SpillFile:
    """A file without a name, under a key that only this process's memory has: both end with the process.

    It has slots of one size, which are used again. Each is sealed under a nonce of its own, which stays in memory
    too: what was changed, swapped or put back in the file does not open.

    Raises:
        OSError: there is no temporary directory that can be written to.
    """

    def __init__(self) -> None:
        suite = SUITES[preferred_suites()[0]]
        self._box = Box(suite, os.urandom(32))
        self._size = SLOT_BYTES + suite.tag_size
        self._file = tempfile.TemporaryFile(prefix="lambda-split-", buffering=0)  # noqa: SIM115
        self._nonces = itertools.count(1)
        self._new = itertools.count()
        # Blocks are freed by the garbage collector, in any thread: no lock is taken for that.
        self._free: deque[int] = deque()
        #: By slot: the nonce and the bytes of ciphertext.
        self._written: dict[int, tuple[int, int]] = {}

    def write(self, data: memoryview) -> list[int]:
        """Seals data; returns the slots that hold it. Raises OSError, and has then written nothing."""
        slots: list[int] = []
        try:
            for begin in range(0, len(data), SLOT_BYTES):
                slots.append(self._take())
                nonce = next(self._nonces)
                sealed = self._box.seal(nonce, _LABEL, bytes(data[begin : begin + SLOT_BYTES]))
                self._written[slots[-1]] = nonce, len(sealed)
                self._put(sealed, slots[-1] * self._size)
        except OSError:
            self.release(slots)
            raise
        return slots

    def read(self, slots: list[int]) -> bytearray:
        """What was written. Raises OSError, and AuthenticationError for what is not what was written."""
        data = bytearray()
        for slot in slots:
            nonce, size = self._written[slot]
            data += self._box.open(nonce, _LABEL, os.pread(self._file.fileno(), size, slot * self._size))
        return data

    def release(self, slots: list[int]) -> None:
        self._free.extend(slots)

    def _take(self) -> int:
        try:
            return self._free.popleft()
        except IndexError:
            return next(self._new)

    def _put(self, sealed: bytes, offset: int) -> None:
        view = memoryview(sealed)
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count
