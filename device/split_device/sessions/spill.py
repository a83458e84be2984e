"""An encrypted temporary file for states that exceed the memory."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import deque

from split_common.protocol.channel import SUITES, Box, preferred_suites

#: Most bytes of plaintext in a slot.
SLOT_BYTES = 1024 * 1024

_LABEL = b"lambda-split spilled states"


class SpillFile:
    """A file without a name, encrypted with a key in this process's memory. Both end with the process.

    It has slots of one size, which are reused. Each is sealed under its own nonce, which stays in memory too.
    Therefore a slot that others changed, swapped or put back does not open. Not thread-safe, but any thread may
    call `release`.

    Raises:
        OSError: no temporary directory can be written to.
    """

    def __init__(self) -> None:
        suite = SUITES[preferred_suites()[0]]
        self._box = Box(suite, os.urandom(32))
        self._size = SLOT_BYTES + suite.tag_size
        self._file = tempfile.TemporaryFile(prefix="lambda-split-", buffering=0)  # noqa: SIM115
        self._nonces = itertools.count(1)
        self._new = itertools.count()
        # The garbage collector frees blocks on any thread. A deque needs no lock.
        self._free: deque[int] = deque()
        #: For each slot, the nonce and the number of bytes of ciphertext.
        self._written: dict[int, tuple[int, int]] = {}

    def write(self, data: memoryview) -> list[int]:
        """Seals data and returns the slots that hold it. Raises OSError if that fails; no slot is then used."""
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
        """The data in these slots. Raises OSError, or AuthenticationError if the data were changed."""
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
