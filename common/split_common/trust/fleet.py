"""A fleet's directory: the operator's key, the members' keys, the roster and the models' manifests.

    operator.key            the operator's Ed25519 seed (32 bytes, 0600); only on the operator's machine
    operator.pub            its public key (32 bytes)
    roster                  all members, signed
    NAME.key                a member's `Identity` (0600)
    models/MODEL.manifest   signed, the name percent-encoded

A member's machine needs its own .key, operator.pub, roster and models/.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec
from filelock import FileLock, Timeout
from msgspec.structs import replace
from nacl.signing import SigningKey

from split_common.errors import CertificateError, KeysError
from split_common.system.files import (
    config_dir,
    private_dir,
    read_private,
    read_public,
    runtime_dir,
    write_private,
    write_public,
)
from split_common.trust.keys import (
    NAME_RULE,
    Certificate,
    Identity,
    Member,
    ModelScope,
    Name,
    Role,
    Roster,
    open_signed,
    seal,
    verify_certificate,
)
from split_common.trust.manifest import Manifest

log = logging.getLogger(__name__)

#: How long a certificate is valid unless told otherwise, in days.
DAYS: Final = 365
#: A certificate is valid from this long before it was made, in seconds: clocks differ.
CLOCK_LEEWAY: Final = 3600
#: The members of a new fleet.
FIRST_MEMBERS: Final[tuple[tuple[Role, str], ...]] = (
    ("broker", "broker"),
    ("device", "device-1"),
    ("worker", "worker-1"),
)

_DAY: Final = 86_400


class Fleet:
    """An open fleet directory. Its roster is what this process enforces; it only ever gets newer.

    Attributes: `path` (the directory), `operator_key` (the operator's Ed25519 public key, 32 bytes),
    `is_loopback` (made on the fly for this user on this machine). Safe to use from several threads; writers
    of several processes take turns.
    """

    def __init__(self, path: Path, operator_key: bytes, *, is_loopback: bool = False) -> None:
        """Use `Fleet.open`, `Fleet.create` or `load_fleet`."""
        self.path = path
        self.operator_key = operator_key
        self.is_loopback = is_loopback
        self._current: tuple[Roster, bytes] = (Roster(0, 0, ()), b"")
        self._stamp: tuple[int, int, int] | None = (0, 0, 0)
        self._adopting = threading.Lock()
        self._file_lock = FileLock(path / ".lock", mode=0o600)

    def __repr__(self) -> str:
        return f"Fleet({str(self.path)!r}, roster version {self.roster().version})"

    @classmethod
    def create(cls, path: Path, days: float = DAYS) -> Fleet:
        """A new fleet of `FIRST_MEMBERS`, certified for `days`; `KeysError` where there is one already."""
        private_dir(path)
        operator = SigningKey.generate()
        fleet = cls(path, bytes(operator.verify_key))
        with fleet.locked():
            if any((path / name).exists() for name in ("operator.key", "operator.pub", "roster")):
                raise KeysError(f"{path} already holds a fleet")
            identities = [_issue(operator, role, name, (), days) for role, name in FIRST_MEMBERS]
            write_private(path / "operator.key", bytes(operator))
            write_public(path / "operator.pub", fleet.operator_key)
            fleet._enlist(operator, identities)
        return fleet

    @classmethod
    def open(cls, path: Path, *, is_loopback: bool = False) -> Fleet:
        """The fleet in `path`; `KeysError` where there is none or it is damaged."""
        operator_key = read_public(path / "operator.pub")
        if len(operator_key) != 32:
            raise KeysError(f"{path / 'operator.pub'} is damaged")
        fleet = cls(path, operator_key, is_loopback=is_loopback)
        fleet._load()
        return fleet

    @classmethod
    def loopback(cls) -> Fleet:
        """This user's fleet for when no keys are configured; made once, renewed when expired or damaged."""
        home = private_dir(runtime_dir())
        path = home / "loopback"
        with FileLock(home / "loopback.lock", mode=0o600):
            try:
                fleet = cls.open(path, is_loopback=True)
                ends = [fleet.read_identity(name).certificate.not_after for _, name in FIRST_MEMBERS]
                if time.time() < min(ends):
                    return fleet
            except KeysError as error:
                if path.exists():
                    log.warning("making the loopback fleet anew: %s", error)
            _swap_in_new(path)
            return cls.open(path, is_loopback=True)

    # --- members -------------------------------------------------------------------------------------------

    def roster(self) -> Roster:
        """The newest roster that this process has accepted."""
        return self._current[0]

    def verify(self, certificate: bytes, role: Role, scope: ModelScope) -> Certificate:
        """What `verify_certificate` gives and raises, by this fleet's operator and its newest roster."""
        return verify_certificate(
            certificate, operator_key=self.operator_key, roster=self.roster(), role=role, scope=scope
        )

    def roster_bytes(self) -> bytes:
        """The same as the operator signed it, to be served to others."""
        return self._current[1]

    def identity(self, role: Role, name: str | None = None) -> Identity:
        """The identity of this role whose key is here; `name` chooses among several.

        Raises `KeysError` for none, for several without `name` (it lists them), for one of another role or
        fleet, and for a revoked one.
        """
        if name is not None:
            return self._identity(role, name)
        names = self._names_here(role)
        if len(names) == 1:
            return self._identity(role, names[0])
        if not names:
            raise KeysError(f"no key of a {role} in {self.path}; copy NAME.key from the operator's machine")
        raise KeysError(f"several {role} keys in {self.path}; choose one of: {', '.join(names)}")

    def read_identity(self, name: str) -> Identity:
        """The identity in `NAME.key` of any role, revoked or not; `KeysError` if missing or damaged."""
        path = self.path / f"{name}.key"
        data = read_private(path)
        try:
            identity = Identity.decode(data)
        except KeysError as error:
            raise KeysError(f"{path}: {error}") from None
        if identity.operator_key != self.operator_key:
            raise KeysError(f"{path} belongs to another fleet")
        return identity

    def add_member(self, role: Role, name: str, models: Iterable[ModelScope] = (), days: float = DAYS) -> Identity:
        """New keys and a certificate in `NAME.key`, and a new roster; `models` empty means any.

        Raises `KeysError` for a name that is taken (by a revoked member, too) or not allowed, and without the
        operator's key.
        """
        try:
            msgspec.convert(name, Name)
        except msgspec.ValidationError:
            raise KeysError(f"{name!r} is not a name for a member: {NAME_RULE}") from None
        with self.locked():
            operator = self._operator()
            self.refresh()
            if self.roster().by_name(name) is not None:
                raise KeysError(f"the fleet already has a member {name!r}; names are never used twice")
            identity = _issue(operator, role, name, tuple(models), days)
            self._enlist(operator, [identity])
        return identity

    def revoke(self, name: str) -> Roster:
        """A new roster in which `name` is revoked, for good; the old one where it was already.

        Raises `KeysError` for an unknown name and without the operator's key.
        """
        with self.locked():
            operator = self._operator()
            self.refresh()
            member = self.roster().by_name(name)
            if member is None:
                raise KeysError(f"the fleet has no member {name!r}")
            if not member.revoked:
                revoked = replace(member, revoked=True)
                members = (revoked if one is member else one for one in self.roster().members)
                self._publish(operator, members)
        return self.roster()

    # --- the roster's life ---------------------------------------------------------------------------------

    def accept_roster(self, data: bytes) -> Roster:
        """Take over a roster that someone else sent, and keep it in the directory where that can be written.

        Raises `CertificateError` for one that the operator did not sign, of a lower version (rollback), or of
        the same version with other content.
        """
        roster = open_signed("roster", Roster, data, self.operator_key)
        self.refresh()
        if self._is_newer(roster, data):
            self._adopt(roster, data)
            # Another process may hold the directory for long, while it hashes a model, say.
            if not self._keep(data, wait=False):
                threading.Thread(target=self._keep, args=(data, True), daemon=True).start()
        return self.roster()

    def _keep(self, data: bytes, wait: bool) -> bool:
        """Writes an accepted roster to the directory, if that can be; False where one would have to wait."""
        try:
            self._file_lock.acquire(blocking=wait)
        except Timeout:
            return False
        except OSError as error:
            log.info("the new roster is kept in memory only: %s", error.strerror)
            return True
        try:
            self.refresh()
            if self._current[1] == data:
                write_public(self.path / "roster", data)
        except KeysError as error:
            log.info("the new roster is kept in memory only: %s", error)
        finally:
            self._file_lock.release()
        return True

    def refresh(self) -> bool:
        """Reread the roster's file if it changed; True when it is newer. A bad file is logged and ignored."""
        try:
            return self._load()
        except KeysError as error:
            log.warning("the roster of version %d stays in force: %s", self.roster().version, error)
            return False

    def _load(self) -> bool:
        path = self.path / "roster"
        try:
            found = path.stat()
        except OSError:
            found = None
        stamp = found and (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        data = read_public(path)
        try:
            roster = open_signed("roster", Roster, data, self.operator_key)
            return self._is_newer(roster, data) and self._adopt(roster, data)
        except CertificateError as error:
            raise KeysError(f"{path}: {error}") from None

    def _is_newer(self, roster: Roster, data: bytes) -> bool:
        """False for the very roster in force; `CertificateError` for an older or a contradicting one."""
        current, current_data = self._current
        if roster.version < current.version:
            raise CertificateError(f"roster of version {roster.version} is older than {current.version}")
        if roster.version == current.version and data != current_data:
            raise CertificateError(f"two rosters of version {roster.version} contradict each other")
        return roster.version > current.version

    def _adopt(self, roster: Roster, data: bytes) -> bool:
        with self._adopting:
            newer = roster.version > self._current[0].version
            if newer:
                self._current = (roster, data)
        return newer

    # --- models --------------------------------------------------------------------------------------------

    def manifests(self) -> list[Manifest]:
        """All models' manifests, by name; `KeysError` for a damaged one or one of another operator."""
        manifests = []
        for path in sorted((self.path / "models").glob("*.manifest")):
            try:
                manifests.append(open_signed("manifest", Manifest, read_public(path), self.operator_key))
            except CertificateError as error:
                raise KeysError(f"{path}: {error}") from None
        return sorted(manifests, key=lambda manifest: manifest.name)

    def add_manifest(self, manifest: Manifest) -> None:
        """Sign and keep it, in place of any of its name; `KeysError` without the operator's key."""
        with self.locked():
            data = seal("manifest", manifest, self._operator())
            write_public(self.path / "models" / f"{quote(manifest.name, safe='@+')}.manifest", data)

    # --- the operator's side -------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process change the directory; may be nested. `KeysError` where it is read-only."""
        try:
            self._file_lock.acquire()
        except OSError as error:
            raise KeysError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            self._file_lock.release()

    def require_operator(self) -> None:
        """Raise `KeysError` unless the operator's key is here: worth asking before a long preparation."""
        self._operator()

    def _operator(self) -> SigningKey:
        path = self.path / "operator.key"
        if not path.exists():
            raise KeysError(f"{path} is not here; do this on the operator's machine")
        seed = read_private(path)
        operator = SigningKey(seed) if len(seed) == 32 else None
        if operator is None or bytes(operator.verify_key) != self.operator_key:
            raise KeysError(f"{path} is damaged, or does not belong to operator.pub")
        return operator

    def _enlist(self, operator: SigningKey, identities: list[Identity]) -> None:
        for identity in identities:
            write_private(self.path / f"{identity.certificate.name}.key", identity.encode())
        certificates = (identity.certificate for identity in identities)
        new = (Member(c.name, c.role, c.sign_key, c.curve_key) for c in certificates)
        self._publish(operator, (*self.roster().members, *new))

    def _publish(self, operator: SigningKey, members: Iterable[Member]) -> None:
        roster = Roster(self.roster().version + 1, int(time.time()), tuple(members))
        data = seal("roster", roster, operator)
        write_public(self.path / "roster", data)
        self._adopt(roster, data)

    def _names_here(self, role: Role) -> list[str]:
        """Members of this role, not revoked, whose keys are here; the roster may not list them yet."""
        names = (path.stem for path in sorted(self.path.glob("*.key")) if path.name != "operator.key")
        return [n for n in names if not self._revoked(n) and self.read_identity(n).certificate.role == role]

    def _identity(self, role: Role, name: str) -> Identity:
        identity = self.read_identity(name)
        if identity.certificate.role != role:
            raise KeysError(f"{name!r} is a {identity.certificate.role}, not a {role}")
        if self._revoked(name):
            raise KeysError(f"{role} {name!r} is revoked")
        return identity

    def _revoked(self, name: str) -> bool:
        member = self.roster().by_name(name)
        return member is not None and member.revoked


def keys_dir(keys: Path | None = None) -> Path:
    """Where keys are meant to be: `keys`, else `LAMBDA_SPLIT_KEYS`, else `keys` in the settings directory."""
    if keys is not None:
        return keys
    configured = os.environ.get("LAMBDA_SPLIT_KEYS")
    return Path(configured) if configured else config_dir() / "keys"


def load_fleet(keys: Path | None = None) -> Fleet:
    """The fleet in `keys_dir(keys)`; the loopback fleet where nothing is configured. Raises `KeysError`."""
    path = keys_dir(keys)
    if keys is None and not os.environ.get("LAMBDA_SPLIT_KEYS") and not path.exists():
        return Fleet.loopback()
    return Fleet.open(path)


def _issue(operator: SigningKey, role: Role, name: str, models: tuple[ModelScope, ...], days: float) -> Identity:
    if days <= 0:
        raise KeysError(f"a certificate cannot last {days} days")
    now = int(time.time())
    return Identity.issue(
        operator,
        lambda sign_key, curve_key: Certificate(
            role, name, sign_key, curve_key, now - CLOCK_LEEWAY, now + int(days * _DAY), models
        ),
    )


def _swap_in_new(path: Path) -> None:
    """Put a new fleet at `path`, whole or not at all; under the loopback lock."""
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}."))
    Fleet.create(work / "new")
    if path.exists():
        path.replace(work / "old")
    (work / "new").replace(path)
    shutil.rmtree(work)
