"""The access rules that `lambda-split redis-acl` prints, enforced by a real server; and the roster in it."""

from __future__ import annotations

import contextlib
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
from msgspec import msgpack, structs

import tiny
from split_common.cli import main
from split_common.errors import BrokerUnreachable, CertificateError, KeysError, NoWorker
from split_common.transport import new_peer_id
from split_common.transport.redis.acl import users
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.roster import publish
from split_common.transport.redis.sweep import sweep
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Roster
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
        lambda r, k: r.set(k["list of worker-1"], b"x"),
        lambda r, k: r.delete(k["list of worker-1"]),
        lambda r, k: r.set(k["roster"], b"x"),
        lambda r, k: r.set(k["boot"], b"x"),
        lambda r, k: r.setnx(k["boot"], b"x"),
    ],
    "worker-1": [
        # Its own revocation, and what others announce, are none of its business.
        lambda r, k: r.set(k["roster"], b"x"),
        lambda r, k: r.setnx(k["roster"], b"x"),
        lambda r, k: r.delete(k["roster"]),
        lambda r, k: r.pexpire(k["roster"], 1),
        lambda r, k: r.append(k["roster"], b"x"),
        lambda r, k: r.setrange(k["roster"], 0, b"x"),
        lambda r, k: r.rename(k["roster copy of worker-1"], k["roster"]),
        lambda r, k: r.set(k["roster copy of worker-2"], b"x"),
        lambda r, k: r.set(k["boot"], b"x"),
        lambda r, k: r.delete(k["boot"]),
        lambda r, k: r.pexpire(k["boot"], 1),
        lambda r, k: r.set(k["list of worker-2"], b"x"),
        lambda r, k: r.delete(k["list of worker-2"]),
        lambda r, k: r.pexpire(k["list of worker-2"], 1),
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
        lambda r, k: r.set(k["list of worker-1"], b"x"),
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
    known = {"roster": keys.roster, "boot": keys.boot}
    for worker in ("worker-1", "worker-2"):
        known[f"list of {worker}"] = keys.workers(worker)
        known[f"roster copy of {worker}"] = keys.roster_copy(worker)
    for member in ("device-1", "device-2", "worker-1", "worker-2"):
        known[member] = keys.lane(member[:6], new_peer_id(member))  # type: ignore[arg-type]
        admin.xadd(known[member], {"h": b"secret", "b": b""})
    with guarded.client(server, user) as client:
        for number, attempt in enumerate(FORBIDDEN[user]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                pytest.fail(f"{user} could do number {number}: {attempt(client, known)}")
        for words in NOBODY:
            if user == "operator" and words[0] in ("SCAN", "INFO"):
                continue
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


def test_nobody_is_called_as_redis_calls_everybody(tmp_path: Path) -> None:
    """Rules for the user `default` would be rules for strangers."""
    fleet = Fleet.create(tmp_path / "keys")
    with pytest.raises(KeysError, match="'default'"):
        fleet.add_member("device", "default")
    older = fleet.roster().members[1]
    roster = Roster(1, 0, (structs.replace(older, name="default"),))
    with pytest.raises(KeysError, match="under another name"):
        users(Keys(fleet.operator_key), roster)
    revoked = Roster(2, 0, (structs.replace(older, name="default", revoked=True),))
    assert list(users(Keys(fleet.operator_key), revoked)) == ["operator"]


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
        member = Keys(own.fleet.operator_key).workers("worker-1")
        wait_until(lambda: msgpack.decode(server.client().get(member))[1] == [] or revoked == "device-1")
        with pytest.raises(CertificateError if revoked == "device-1" else NoWorker):
            client.open_session()
    assert other.own_fleet().roster().version == own.fleet.roster().version


def test_false_rosters_in_the_server_change_nothing(own: Setting) -> None:
    keys = Keys(own.fleet.operator_key)
    with running_valkey() as server:
        client = server.client()
        client.set(keys.roster, b"not signed")
        with own.worker(server.address) as worker, own.client(server.address) as device:
            assert len(run_steps(device, 3)) == 4
            wait_until(lambda: worker._transport.counters["CertificateError"] > 0)
            wait_until(lambda: device.transport.counters["CertificateError"] > 0)
            client.set(keys.roster_copy("worker-1"), b"not signed either")
            wait_until(lambda: client.get(keys.roster_copy("worker-1")) == own.fleet.roster_bytes())
            client.delete(keys.roster)
            client.lpush(keys.roster, b"of another type")
            time.sleep(1.5)
            assert len(run_steps(device, 3)) == 4


def test_a_server_that_lost_its_data_gets_the_roster_back_from_workers(own: Setting, tmp_path: Path) -> None:
    stale = copied(own, tmp_path / "stale")
    own.fleet.add_member("device", "device-9")
    with running_valkey() as server, own.worker(server.address):
        assert server.client().get(Keys(own.fleet.operator_key).roster) is None
        with stale.client(server.address) as device:
            wait_until(lambda: device._fleet.roster().version == own.fleet.roster().version)
            assert len(run_steps(device, 3)) == 4


def test_a_worker_cannot_keep_its_own_revocation_from_being_published(
    guarded: Guarded, server: Valkey, tmp_path: Path
) -> None:
    """Whatever it writes with the rights of its user, and whatever an older version's rules allowed it to write."""
    admin, worker = guarded.client(server, "admin"), guarded.client(server, "worker-2")
    keys, fleet = guarded.keys, guarded.fleet
    worker.set(keys.roster_copy("worker-2"), fleet.roster_bytes())
    older = fleet.roster_bytes()
    stale = copied(guarded.setting, tmp_path / "stale")
    fleet.add_member("worker", "worker-9")
    fleet.revoke("worker-9")
    for before in (b"", b"junk", older, bytes(2**16), None):
        admin.delete(keys.roster)
        if before is None:
            admin.lpush(keys.roster, b"of another type")
        elif before:
            admin.set(keys.roster, before)
        admin.set(f"{keys.roster}-version", b"999999999999999999")
        assert publish(guarded.address(server.address, "operator"), fleet) == fleet.roster().version
        assert admin.get(keys.roster) == fleet.roster_bytes()
    with stale.client(guarded.address(server.address, "device-1")) as device:
        wait_until(lambda: device._fleet.roster().version == fleet.roster().version)
    admin.delete(keys.roster, keys.roster_copy("worker-2"), f"{keys.roster}-version")


def test_publishing_never_goes_back(own: Setting, tmp_path: Path) -> None:
    stale = copied(own, tmp_path / "stale")
    own.fleet.revoke("device-1")
    with running_valkey() as server:
        for setting in (own, stale):
            published = lambda_split("keys", "publish", "--keys", setting.fleet.path, "--broker", server.address)
            assert published.returncode == 0, published.stderr
        assert server.client().get(Keys(own.fleet.operator_key).roster) == own.fleet.roster_bytes()
    assert "has replaced it" in published.stderr
    assert stale.own_fleet().roster().version == own.fleet.roster().version


# --- what members leave there ------------------------------------------------------------------------------


def test_a_sweep_removes_what_has_no_place_there_and_nothing_else(
    guarded: Guarded, server: Valkey, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, keys, setting = guarded.fleet, guarded.keys, guarded.setting
    admin, hostile = guarded.client(server, "admin"), guarded.client(server, "device-2")

    def swept(*options: str) -> Any:
        monkeypatch.setenv("LAMBDA_SPLIT_BROKER", guarded.address(server.address, "operator"))
        assert main(["keys", "sweep", "--keys", str(fleet.path), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    admin.set("of another program", b"x")
    admin.hset(keys.old_workers, "x", b"of an older version")
    admin.xadd(f"{keys.prefix}:{{open:00:1:2}}", {"h": b"of an older version"})
    endless = keys.lane("device", new_peer_id("device-2"))
    hostile.xadd(endless, {"h": b"", "b": bytes(2**20)})
    leased = keys.lane("device", new_peer_id("device-2"))
    hostile.xadd(leased, {"h": b"", "b": bytes(2**10)})
    hostile.pexpire(leased, 3_000)
    admin.pexpire(leased, 900_000)
    with (
        setting.worker(guarded.address(server.address, "worker-1")) as worker,
        setting.client(guarded.address(server.address, "device-1")) as device,
    ):
        session = device.open_session()
        session.call([step(0)])
        planned = swept("--dry-run")
        assert admin.exists(endless)
        removed = swept()
        assert removed["removed"] == planned["removed"]
        assert removed["removed"]["device-2"]["keys"] == 1
        assert removed["removed"]["device-2"]["bytes"] > 2**20
        assert removed["removed"][""]["keys"] == 2
        assert not admin.exists(endless)
        assert admin.exists(leased)
        session.call([step(1)])
        assert worker.counters["channels"] == 1
        # What a revoked member has goes, whatever its lease.
        fleet.add_member("device", "device-8")
        mine = keys.lane("device", new_peer_id("device-8"))
        admin.xadd(mine, {"h": b"", "b": b""})
        admin.pexpire(mine, 3_000_000)
        fleet.revoke("device-8")
        assert swept()["removed"] == {"device-8": {"keys": 1, "bytes": pytest.approx(5000, abs=5000)}}
        session.call([step(2)])
    assert admin.delete("of another program") == 1
    admin.delete(leased)
    assert swept()["removed"] == {}


def test_a_sweep_sees_all_of_a_cluster(own: Setting) -> None:
    keys = Keys(own.fleet.operator_key)
    with running_cluster() as (address, nodes):
        strangers = [f"{keys.prefix}:{{x{number}}}" for number in range(30)]
        for name in strangers:
            for node in nodes:
                with contextlib.suppress(redis.exceptions.MovedError):
                    node.client().set(name, b"x")
        assert sweep(address, own.fleet).keys == {"": len(strangers)}
        assert sum(node.client().dbsize() for node in nodes) == 1
