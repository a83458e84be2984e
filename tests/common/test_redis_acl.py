"""The access rules that `lambda-split redis-acl` prints, enforced by a real server; and the roster in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import tiny
from split_common.errors import BrokerUnreachable, CertificateError, NoWorker
from split_common.transport import new_peer_id
from split_common.transport.redis.key_names import Keys
from valkeys import Valkey, running_cluster, running_valkey
from wiretap import LATE, SOON, Setting, run_steps, step, wait_until


def lambda_split(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "split_common", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LATE, env={**os.environ, **env})


class Guarded:
    """A fleet of two devices and two workers, and the passwords of their users."""

    def __init__(self, directory: Path) -> None:
        self.setting = Setting(directory, tiny.save("llama", directory / "model"))
        self.fleet = self.setting.fleet
        self.fleet.add_member("device", "device-2")
        self.fleet.add_member("worker", "worker-2")
        self.passwords = directory / "passwords"
        self.acl_file = directory / "users.acl"
        printed = lambda_split(
            *("redis-acl", "--keys", self.fleet.path, "--format", "aclfile", "--passwords", self.passwords)
        )
        assert printed.returncode == 0, printed.stderr
        self.acl_file.write_text(f"user default off\nuser admin on >admin ~* &* +@all\n{printed.stdout}")
        self.keys = Keys(self.fleet.operator_key)

    def password(self, user: str) -> str:
        return "admin" if user == "admin" else (self.passwords / f"{user}.password").read_text()

    def address(self, address: str, user: str) -> str:
        scheme, _, rest = address.partition("://")
        return f"{scheme}://{user}:{self.password(user)}@{rest}"

    def client(self, server: Valkey, user: str) -> redis.Redis:
        return server.client(username=user, password=self.password(user))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    return Guarded(tmp_path_factory.mktemp("guarded"))


@pytest.fixture(scope="module")
def server(guarded: Guarded) -> Iterator[Valkey]:
    with running_valkey("--aclfile", str(guarded.acl_file)) as running:
        yield running


def test_the_rules_allow_all_that_is_needed(guarded: Guarded, server: Valkey) -> None:
    """Everything that a link ever does, and the server's own log of what it refused stays empty."""
    admin = guarded.client(server, "admin")
    admin.execute_command("ACL", "LOG", "RESET")
    setting = guarded.setting
    one, two = (guarded.address(server.address, worker) for worker in ("worker-1", "worker-2"))
    device = guarded.address(server.address, "device-1")
    with setting.worker(one) as first, setting.client(device) as client:
        expected = run_steps(client, 10)
        with setting.worker(two, member="worker-2") as second:
            # An open that avoids a worker takes another way, and so does one that nobody has room for.
            session = client.open_session([first.id])
            session.call([step(0)])
            assert second.counters["steps"] == 1
        wait_until(lambda: session.ended)
        assert run_steps(client, 10) == expected
        time.sleep(2.5)
    published = lambda_split(
        *("keys", "publish", "--keys", guarded.fleet.path, "--json"),
        LAMBDA_SPLIT_BROKER=guarded.address(server.address, "operator"),
    )
    assert published.returncode == 0, published.stderr
    assert guarded.password("operator") not in published.stdout + published.stderr
    assert json.loads(published.stdout)["roster_version"] == guarded.fleet.roster().version
    assert admin.execute_command("ACL", "LOG") == []


def test_the_rules_suffice_in_a_cluster(guarded: Guarded) -> None:
    with running_cluster() as (address, nodes):
        for node in nodes:
            for line in guarded.acl_file.read_text().splitlines()[1:]:
                _, user, rest = line.split(" ", 2)
                words, selectors = rest.partition("(")[::2]
                rules = words.split() + [f"({one.strip()}" for one in selectors.split("(") if one]
                node.client().execute_command("ACL", "SETUSER", user, *rules)
        device, worker = (guarded.address(address, user) for user in ("device-1", "worker-1"))
        with guarded.setting.worker(worker), guarded.setting.client(device) as client:
            assert len(run_steps(client, 5)) == 6


Attempt = Callable[[redis.Redis, dict[str, str]], Any]

#: What must not be possible, by user.
FORBIDDEN: dict[str, list[Attempt]] = {
    "device-1": [
        lambda r, k: r.xread({k["device-2"]: "0"}),
        lambda r, k: r.xrange(k["device-2"]),
        lambda r, k: r.xadd(k["device-2"], {"h": b"", "b": b""}),
        lambda r, k: r.delete(k["device-2"]),
        lambda r, k: r.xread({k["worker-1"]: "0"}),
        lambda r, k: r.xrange(k["worker-1"]),
        lambda r, k: r.xtrim(k["worker-1"], 0),
        lambda r, k: r.xdel(k["worker-1"], "1-1"),
        lambda r, k: r.delete(k["worker-1"]),
        lambda r, k: r.pexpire(k["worker-1"], 1),
        lambda r, k: r.rename(k["worker-1"], k["device-1"]),
        lambda r, k: r.copy(k["worker-1"], k["device-1"]),
        lambda r, k: r.execute_command("DUMP", k["worker-1"]),
        lambda r, k: r.xread({k["opens"]: "0"}),
        lambda r, k: r.xreadgroup("workers", "device-1", {k["opens"]: ">"}),
        lambda r, k: r.xdel(k["opens"], "1-1"),
        lambda r, k: r.delete(k["opens"]),
        lambda r, k: r.hset(k["workers"], "x", "y"),
        lambda r, k: r.set(k["roster"], b"x"),
        lambda r, k: r.set(k["boot"], b"x"),
    ],
    "worker-1": [
        lambda r, k: r.xread({k["worker-2"]: "0"}),
        lambda r, k: r.xrange(k["worker-2"]),
        lambda r, k: r.xadd(k["worker-2"], {"h": b"", "b": b""}),
        lambda r, k: r.delete(k["worker-2"]),
        lambda r, k: r.xread({k["device-1"]: "0"}),
        lambda r, k: r.xrange(k["device-1"]),
        lambda r, k: r.xtrim(k["device-1"], 0),
        lambda r, k: r.delete(k["device-1"]),
        lambda r, k: r.pexpire(k["device-1"], 1),
        lambda r, k: r.execute_command("DUMP", k["device-1"]),
    ],
    "operator": [
        lambda r, k: r.xread({k["worker-1"]: "0"}),
        lambda r, k: r.xread({k["device-1"]: "0"}),
        lambda r, k: r.xread({k["opens"]: "0"}),
    ],
}
#: What no member may do.
NOBODY = [
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("MONITOR",),
    ("CONFIG", "GET", "*"),
    ("FLUSHALL",),
    ("ACL", "LIST"),
    ("EVAL", "return 1", "0"),
    ("PUBLISH", "x", "y"),
    ("GET", "something"),
    ("INFO",),
]


@pytest.mark.parametrize("user", FORBIDDEN)
def test_the_rules_forbid_what_is_not_needed(guarded: Guarded, server: Valkey, user: str) -> None:
    keys = guarded.keys
    admin = guarded.client(server, "admin")
    known = {"workers": keys.workers, "roster": keys.roster, "boot": keys.boot}
    known["opens"] = keys.opens(guarded.setting.service)
    for member in ("device-1", "device-2", "worker-1", "worker-2"):
        known[member] = keys.lane(member[:6], new_peer_id(member))  # type: ignore[arg-type]
        admin.xadd(known[member], {"h": b"secret", "b": b""})
    with guarded.client(server, user) as client:
        for number, attempt in enumerate(FORBIDDEN[user]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                pytest.fail(f"{user} could do number {number}: {attempt(client, known)}")
        for words in NOBODY:
            with pytest.raises(redis.exceptions.NoPermissionError):
                pytest.fail(f"{user} could do {words}: {client.execute_command(*words)}")
        if user.startswith("device"):
            assert client.xread({known[user]: "0"}) != []
            client.xadd(known["worker-1"], {"h": b"", "b": b""}, nomkstream=True)
    for member in ("device-1", "device-2", "worker-1", "worker-2"):
        admin.delete(known[member])


def test_a_missing_permission_is_said_at_once(guarded: Guarded, server: Valkey) -> None:
    guarded.client(server, "admin").execute_command("ACL", "SETUSER", "narrow", "on", ">narrow", "~*", "+ping")
    address = server.address.replace("//", "//narrow:narrow@")
    began = time.monotonic()
    with pytest.raises(BrokerUnreachable, match="redis-acl"), guarded.setting.client(address, timeout=LATE):
        pass
    assert time.monotonic() - began < SOON < LATE


def test_the_command(guarded: Guarded) -> None:
    printed = lambda_split("redis-acl", "--keys", guarded.fleet.path)
    lines = printed.stdout.splitlines()
    assert [line.split()[2] for line in lines] == ["device-1", "worker-1", "device-2", "worker-2", "operator"]
    assert "#" not in printed.stdout
    assert ">" not in printed.stdout
    users = json.loads(lambda_split("redis-acl", "--keys", guarded.fleet.path, "--json").stdout)["users"]
    assert set(users) == {"device-1", "worker-1", "device-2", "worker-2", "operator"}
    for path in guarded.passwords.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


# --- the roster --------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Setting:
    return Setting(tmp_path, tiny.save("llama", tmp_path / "model"))


def copied(setting: Setting, directory: Path) -> Setting:
    """The same fleet on another machine, whose roster gets newer over the queue alone."""
    path = directory / "keys"
    path.mkdir(parents=True, mode=0o700)
    for name in ("operator.pub", "roster", "device-1.key", "worker-1.key"):
        (path / name).write_bytes((setting.fleet.path / name).read_bytes())
        (path / name).chmod(0o600)
    other = object.__new__(Setting)
    other.__dict__ = {**setting.__dict__, "fleet": type(setting.fleet).open(path)}
    return other


@pytest.mark.parametrize("revoked", ["device-1", "worker-1"])
def test_revoked_members_lose_their_channels_while_all_runs(own: Setting, tmp_path: Path, revoked: str) -> None:
    other = copied(own, tmp_path / "other")
    with (
        running_valkey() as server,
        other.worker(server.address) as worker,
        other.client(server.address) as client,
    ):
        session = client.open_session()
        session.call([step(0)])
        assert len(worker._sessions) == 1
        own.fleet.revoke(revoked)
        published = lambda_split("keys", "publish", "--keys", own.fleet.path, "--broker", server.address)
        assert published.returncode == 0, published.stderr
        wait_until(lambda: session.ended)
        if revoked == "device-1":
            wait_until(lambda: len(worker._sessions) == 0)
        # A revoked worker withdraws; a revoked device trusts itself no more.
        wait_until(lambda: not worker._transport._parts.worker_opens.room or revoked == "device-1")
        with pytest.raises(CertificateError if revoked == "device-1" else NoWorker):
            client.open_session()
    assert other.own_fleet().roster().version == own.fleet.roster().version


def test_a_worker_publishes_a_newer_roster_and_a_false_one_changes_nothing(own: Setting, tmp_path: Path) -> None:
    keys = Keys(own.fleet.operator_key)
    with running_valkey() as server:
        client = server.client()
        client.set(keys.roster, b"not signed")
        client.set(keys.roster_version, 99)
        with own.worker(server.address) as worker, own.client(server.address) as device:
            assert len(run_steps(device, 3)) == 4
            wait_until(lambda: worker._transport.counters["CertificateError"] > 0)
            wait_until(lambda: device.transport.counters["CertificateError"] > 0)
            client.set(keys.roster_version, b"nonsense")
            wait_until(lambda: device.transport.counters["Malformed"] > 0)
            client.delete(keys.roster, keys.roster_version)
            wait_until(lambda: client.get(keys.roster) == own.fleet.roster_bytes())
            own.fleet.add_member("device", "device-9")
            # The directory that this worker reads is the operator's own here.
            wait_until(lambda: client.get(keys.roster_version) == str(own.fleet.roster().version).encode())
            assert len(run_steps(device, 3)) == 4
