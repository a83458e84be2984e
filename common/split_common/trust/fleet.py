"""A fleet's directory: the operator's key, the members' keys, the roster and the models' manifests.

    operator.key            the operator's Ed25519 seed (32 bytes, or sealed under a passphrase; 0600); only on the
                            operator's machine
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
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec
from filelock import FileLock
from msgspec.structs import replace
from nacl.signing import SigningKey

from split_common.errors import CertificateError, KeysError
from split_common.system.files import (
    check_writable,
    config_dir,
    private_dir,
    read_private,
    read_public,
    runtime_dir,
    user_path,
    write_private,
    write_public,
)
from split_common.trust.keys import (
    NAME_RULE,
    RESERVED_NAMES,
    Certificate,
    Identity,
    Member,
    ModelScope,
    Name,
    Role,
    Roster,
    issue_identity,
    open_signed,
    seal,
    verify_certificate,
)
from split_common.trust.manifest import Manifest
from split_common.trust.operator_key import OperatorKey
from split_common.trust.passphrase import seal_secret
from split_common.trust.roster_store import RosterStore

log = logging.getLogger(__name__)

#: Validity of a certificate by default, in days.
DAYS: Final = 365
#: The members of a new fleet.
FIRST_MEMBERS: list[tuple[Role, str]] = [("broker", "broker"), ("device", "device-1"), ("worker", "worker-1")]


class Fleet:
    """An open fleet directory. This process enforces its roster, which only ever gets newer.

    Any thread may call its methods. Processes that write to the directory take turns.

    Args:
        path: the directory.
        operator_key: the operator's Ed25519 public key (32 bytes).
        is_loopback: whether the fleet was made on the fly, for this user on this machine.
    """

    def __init__(self, path: Path, operator_key: bytes, *, is_loopback: bool = False) -> None:
        """Use `Fleet.open`, `Fleet.create` or `load_fleet`."""
        self.path = path
        self.operator_key = operator_key
        self.is_loopback = is_loopback
        self._file_lock = FileLock(path / ".lock", mode=0o600)
        self._roster_store = RosterStore(path / "roster", operator_key, self._file_lock)
        self._operator_key = OperatorKey(path / "operator.key", operator_key)

    def __repr__(self) -> str:
        return f"Fleet({str(self.path)!r}, roster version {self.roster().version})"

    @classmethod
    def create(cls, path: Path, days: float = DAYS, passphrase: str | None = None) -> Fleet:
        """Makes a fleet of `FIRST_MEMBERS`.

        Args:
            path: the directory.
            days: validity of the certificates.
            passphrase: seals the operator's key.

        Raises:
            KeysError: there is a fleet already, the directory cannot be used, or the passphrase is empty.
        """
        private_dir(path)
        operator = SigningKey.generate()
        seed = bytes(operator) if passphrase is None else seal_secret(bytes(operator), passphrase)
        fleet = cls(path, bytes(operator.verify_key))
        with fleet.locked():
            if any((path / name).exists() for name in ("operator.key", "operator.pub", "roster")):
                raise KeysError(f"{path} already holds a fleet")
            identities = [issue_identity(operator, role, name, (), days) for role, name in FIRST_MEMBERS]
            write_private(path / "operator.key", seed)
            write_public(path / "operator.pub", fleet.operator_key)
            fleet._enlist(operator, identities)
        return fleet

    @classmethod
    def open(cls, path: Path, *, is_loopback: bool = False) -> Fleet:
        """Opens the fleet in a directory.

        Raises:
            KeysError: there is none, or it is damaged.
        """
        operator_key = read_public(path / "operator.pub")
        if len(operator_key) != 32:
            raise KeysError(f"{path / 'operator.pub'} is damaged")
        fleet = cls(path, operator_key, is_loopback=is_loopback)
        fleet._roster_store.load()
        return fleet

    @classmethod
    def loopback(cls) -> Fleet:
        """This user's fleet for when no keys are configured; made once, and again if it has expired or is damaged.

        Raises:
            KeysError: other users can write to its directory.
        """
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
                    log.warning("making a new loopback fleet: %s", error)
            _swap_in_new(path)
            return cls.open(path, is_loopback=True)

    # --- members -------------------------------------------------------------------------------------------

    def roster(self) -> Roster:
        """The newest roster that this process has accepted."""
        return self._roster_store.roster

    def verify(self, certificate: bytes, role: Role, scope: ModelScope) -> Certificate:
        """Calls `verify_certificate` with this fleet's operator and its newest roster."""
        return verify_certificate(
            certificate, operator_key=self.operator_key, roster=self.roster(), role=role, scope=scope
        )

    def roster_bytes(self) -> bytes:
        """The newest roster as the operator signed it, for other peers."""
        return self._roster_store.data

    def identity(self, role: Role, name: str | None = None) -> Identity:
        """The identity of this role whose key is here.

        Args:
            role: the member's role.
            name: chooses among several keys.

        Raises:
            KeysError: there is no such key; there are several and no `name` (the message lists them); or the key
                is of another role or fleet, or revoked.
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
        """The identity in `NAME.key`, of any role, revoked or not.

        Raises:
            KeysError: the file is missing, damaged, or of another fleet.
        """
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
        """Writes new keys and a certificate to `NAME.key`, and a new roster.

        Args:
            role: the member's role.
            name: the member's name.
            models: what the member may serve or use; empty for any model.
            days: validity of the certificate.

        Raises:
            KeysError: the name is not allowed, or is or was a member's; or the operator's key is not here.
        """
        try:
            msgspec.convert(name, Name)
            allowed = name not in RESERVED_NAMES
        except msgspec.ValidationError:
            allowed = False
        if not allowed:
            raise KeysError(f"{name!r} is not a name for a member: {NAME_RULE}")
        with self.locked():
            operator = self._operator_key.read()
            self.refresh()
            if self.roster().by_name(name) is not None:
                raise KeysError(f"the fleet already has a member {name!r}; names are never used twice")
            identity = issue_identity(operator, role, name, tuple(models), days)
            self._enlist(operator, [identity])
        return identity

    def revoke(self, name: str) -> Roster:
        """Publishes a roster in which the member is revoked for good, unless it is already.

        Returns:
            The roster in force.

        Raises:
            KeysError: no member has this name, or the operator's key is not here.
        """
        with self.locked():
            operator = self._operator_key.read()
            self.refresh()
            member = self.roster().by_name(name)
            if member is None:
                raise KeysError(f"the fleet has no member {name!r}")
            if not member.revoked:
                revoked = replace(member, revoked=True)
                members = (revoked if one is member else one for one in self.roster().members)
                self._publish(operator, members)
        return self.roster()

    # --- the roster ----------------------------------------------------------------------------------------

    def accept_roster(self, data: bytes) -> Roster:
        """Adopts a roster that another peer sent if it is newer, and keeps it in the directory if possible.

        Returns:
            The roster in force.

        Raises:
            CertificateError: the operator did not sign it, its version is lower (a rollback), or it has the same
                version as the current one and other content.
        """
        self._roster_store.accept(data)
        return self.roster()

    def refresh(self) -> bool:
        """Reads the roster's file if it has changed. True if it is newer. A bad file is logged and ignored."""
        return self._roster_store.refresh()

    # --- models --------------------------------------------------------------------------------------------

    def manifests(self) -> list[Manifest]:
        """All models' manifests, sorted by name.

        Raises:
            KeysError: one is damaged, or another operator signed it.
        """
        manifests = []
        for path in sorted((self.path / "models").glob("*.manifest")):
            try:
                manifests.append(open_signed("manifest", Manifest, read_public(path), self.operator_key))
            except CertificateError as error:
                raise KeysError(f"{path}: {error}") from None
        return sorted(manifests, key=lambda manifest: manifest.name)

    def add_manifest(self, manifest: Manifest) -> None:
        """Signs and keeps a manifest; it replaces one of the same name.

        Raises:
            KeysError: the operator's key is not here, or the directory cannot be written.
        """
        with self.locked():
            data = seal("manifest", manifest, self._operator_key.read())
            write_public(self.path / "models" / f"{quote(manifest.name, safe='@+')}.manifest", data)

    # --- the operator's side -------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from changing the directory; may be nested.

        Raises:
            KeysError: the directory cannot be written.
        """
        try:
            self._file_lock.acquire()
        except OSError as error:
            raise KeysError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            self._file_lock.release()

    def require_operator(self) -> None:
        """Checks that a manifest can be signed and kept: to be called before a long preparation.

        Raises:
            KeysError: the operator's key is not here, or damaged; or the directory cannot be written.
        """
        self._operator_key.read()
        check_writable(self.path / "models")

    def _enlist(self, operator: SigningKey, identities: list[Identity]) -> None:
        for identity in identities:
            write_private(self.path / f"{identity.certificate.name}.key", identity.encode())
        certificates = (identity.certificate for identity in identities)
        new = (Member(c.name, c.role, c.sign_key, c.curve_key) for c in certificates)
        self._publish(operator, (*self.roster().members, *new))

    def _publish(self, operator: SigningKey, members: Iterable[Member]) -> None:
        roster = Roster(self.roster().version + 1, int(time.time()), tuple(members))
        data = seal("roster", roster, operator)
        self._roster_store.replace(roster, data)

    def _names_here(self, role: Role) -> list[str]:
        """Members of this role whose keys are here and not revoked; the roster may not list them yet."""
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
    """The directory for keys: `keys`, else `LAMBDA_SPLIT_KEYS`, else `keys` in the settings directory."""
    configured = keys or os.environ.get("LAMBDA_SPLIT_KEYS")
    return user_path(configured) if configured else config_dir() / "keys"


def load_fleet(keys: Path | None = None) -> Fleet:
    """The fleet in `keys_dir(keys)`; the loopback fleet if no keys are configured.

    Raises:
        KeysError: there is no fleet in the directory, or it is damaged.
    """
    path = keys_dir(keys)
    if keys is None and not os.environ.get("LAMBDA_SPLIT_KEYS") and not path.exists():
        return Fleet.loopback()
    return Fleet.open(path)


def _swap_in_new(path: Path) -> None:
    """Puts a new fleet at `path`, whole or not at all. The caller holds the lock of the loopback fleet."""
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}."))
    Fleet.create(work / "new")
    if path.exists():
        path.replace(work / "old")
    (work / "new").replace(path)
    shutil.rmtree(work)
