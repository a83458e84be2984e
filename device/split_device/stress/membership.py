"""How the processes of a run join the fleet: with shared keys, or each as a member with keys of its own."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from split_common.errors import ConfigError
from split_common.system.files import private_dir, write_private
from split_common.transport.address import is_redis
from split_common.trust.fleet import FIRST_MEMBERS, Fleet
from split_common.trust.keys import Role
from split_common.trust.manifest import Manifest


class Membership(Protocol):
    """What a process needs in order to join, by its name in the report, e.g. "worker 0"."""

    def options(self, name: str) -> list[str]:
        """Options of its command that say which keys it uses."""

    def env(self, name: str) -> dict[str, str]:
        """Its environment variables."""

    def address(self, address: str, name: str) -> str:
        """The queue's address for it."""


class SharedKeys:
    """All processes use the keys in one directory, or those that are made for this machine.

    Args:
        keys: the directory; None for the keys of this machine.
    """

    def __init__(self, keys: Path | None) -> None:
        self._options = ["--keys", str(keys)] if keys is not None else []

    def options(self, _name: str) -> list[str]:
        return self._options

    def env(self, _name: str) -> dict[str, str]:
        return {}

    def address(self, address: str, _name: str) -> str:
        return address


class OwnKeys:
    """A fleet that is made for the run. Each process has its own certificate, and its own user in Redis.

    Args:
        directory: for the fleet and for what is copied to each member's machine.
        roles: the role of each process, by its name in the report.
        manifests: of the models that are served.
    """

    def __init__(self, directory: Path, roles: Mapping[str, Role], manifests: list[Manifest]) -> None:
        self._directory = directory
        self.fleet = Fleet.create(directory / "fleet")
        for manifest in manifests:
            self.fleet.add_manifest(manifest)
        known = {name for _, name in FIRST_MEMBERS}
        for name, role in roles.items():
            if member_name(name) not in known:
                self.fleet.add_member(role, member_name(name))
        self._passwords = {member_name(name): secrets.token_urlsafe(32) for name in roles}
        for name in ("broker", *roles):
            self._copy(member_name(name))

    def _copy(self, member: str) -> None:
        """Makes the directory that the machine of a member would have."""
        here, there = self.fleet.path, private_dir(self._directory / member)
        for file in ("operator.pub", "roster", f"{member}.key"):
            shutil.copy2(here / file, there / file)
        shutil.copytree(here / "models", there / "models")

    def options(self, name: str) -> list[str]:
        return ["--keys", str(self._directory / member_name(name))]

    def env(self, name: str) -> dict[str, str]:
        password = self._passwords.get(member_name(name))
        return {} if password is None else {"LAMBDA_SPLIT_REDIS_PASSWORD": password}

    def address(self, address: str, name: str) -> str:
        if not is_redis(address):
            return address
        return address.replace("redis://", f"redis://{member_name(name)}@", 1)

    def acl_file(self) -> Path:
        """Writes the access rules of the members' Redis users, as `lambda-split redis-acl` makes them."""
        from split_common.transport.redis import acl
        from split_common.transport.redis.key_names import Keys

        lines = ["user default off"]
        for name, words in acl.users(Keys(self.fleet.operator_key), self.fleet.roster()).items():
            if name in self._passwords:
                lines.append(" ".join(["user", name, "on", "resetpass", self._hash(name), *words]))
        path = self._directory / "users.acl"
        write_private(path, "".join(f"{line}\n" for line in lines).encode())
        return path

    def _hash(self, name: str) -> str:
        return "#" + hashlib.sha256(self._passwords[name].encode()).hexdigest()


def member_name(name: str) -> str:
    """The member that a process is, by its name in the report: "worker 0" is worker-0."""
    return name.replace(" ", "-")


def check_own_fleet(broker: str | None) -> None:
    """Raises ConfigError if a queue runs already: its operator's key, with which members are made, is not here."""
    if broker is not None:
        raise ConfigError("--hostile makes a fleet of its own: leave --broker and --keys out")
