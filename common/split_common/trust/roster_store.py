"""The roster that a process enforces, and the file that keeps it in the fleet's directory."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from filelock import FileLock, Timeout

from split_common.errors import CertificateError, KeysError
from split_common.system.files import read_public, write_public
from split_common.trust.keys import Roster, open_signed

log = logging.getLogger(__name__)


class RosterStore:
    """The newest roster that this process has accepted; a lower version never replaces a higher one.

    Any thread may call its methods.

    Args:
        path: the roster's file.
        operator_key: the operator's Ed25519 public key (32 bytes).
        file_lock: held by the process that changes the fleet's directory.
    """

    def __init__(self, path: Path, operator_key: bytes, file_lock: FileLock) -> None:
        self._path = path
        self._operator_key = operator_key
        self._file_lock = file_lock
        self._current: tuple[Roster, bytes] = (Roster(0, 0, ()), b"")
        # Time of change (ns), size (bytes) and inode of the file that was read last; None if there was no file.
        self._stamp: tuple[int, int, int] | None = (0, 0, 0)
        self._adopting = threading.Lock()

    @property
    def roster(self) -> Roster:
        return self._current[0]

    @property
    def data(self) -> bytes:
        """The roster as the operator signed it."""
        return self._current[1]

    def accept(self, data: bytes) -> None:
        """Adopts a roster that another peer sent if it is newer, and writes it to the file if possible.

        Raises:
            CertificateError: the operator did not sign it, its version is lower (a rollback), or it has the same
                version as the current one and other content.
        """
        roster = open_signed("roster", Roster, data, self._operator_key)
        self.refresh()
        if self._is_newer(roster, data):
            self._adopt(roster, data)
            # Another process may hold the directory for long, e.g. while it hashes a model.
            if not self._keep(data, wait=False):
                threading.Thread(target=self._keep, args=(data, True), daemon=True).start()

    def replace(self, roster: Roster, data: bytes) -> None:
        """Writes the operator's new roster to the file and adopts it. The caller holds the file lock.

        Raises:
            KeysError: the file cannot be written.
        """
        write_public(self._path, data)
        self._adopt(roster, data)

    def refresh(self) -> bool:
        """Reads the file again if it has changed. True if its roster is newer. A bad file is logged and ignored."""
        try:
            return self.load()
        except KeysError as error:
            log.warning("the roster of version %d stays in force: %s", self.roster.version, error)
            return False

    def load(self) -> bool:
        """Reads the file if it has changed. True if its roster is newer.

        Raises:
            KeysError: the file is missing or damaged, or its roster must not replace the current one.
        """
        try:
            found = self._path.stat()
        except OSError:
            found = None
        stamp = found and (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        data = read_public(self._path)
        try:
            roster = open_signed("roster", Roster, data, self._operator_key)
            return self._is_newer(roster, data) and self._adopt(roster, data)
        except CertificateError as error:
            raise KeysError(f"{self._path}: {error}") from None

    def _keep(self, data: bytes, wait: bool) -> bool:
        """Writes an accepted roster to the file, if possible. False if another process holds the lock.

        Args:
            data: the roster; it is not written if a newer one has been adopted meanwhile.
            wait: whether to wait for the lock.
        """
        try:
            self._file_lock.acquire(blocking=wait)
        except Timeout:
            return False
        except OSError as error:
            log.info("the new roster is kept in memory only: %s", error.strerror)
            return True
        try:
            self.refresh()
            if self.data == data:
                write_public(self._path, data)
        except KeysError as error:
            log.info("the new roster is kept in memory only: %s", error)
        finally:
            self._file_lock.release()
        return True

    def _is_newer(self, roster: Roster, data: bytes) -> bool:
        """False for the current roster itself.

        Raises:
            CertificateError: the roster is older than the current one, or contradicts it.
        """
        current, current_data = self._current
        if roster.version < current.version:
            raise CertificateError(f"roster of version {roster.version} is older than {current.version}")
        if roster.version == current.version and data != current_data:
            raise CertificateError(f"two rosters of version {roster.version} contradict each other")
        return roster.version > current.version

    def _adopt(self, roster: Roster, data: bytes) -> bool:
        with self._adopting:
            newer = roster.version > self.roster.version
            if newer:
                self._current = (roster, data)
        return newer
