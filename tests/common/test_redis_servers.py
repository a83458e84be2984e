"""Redis as it is run: over TLS, with passwords, under Sentinels, as a cluster; and what is said without it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

import tiny
from split_common.errors import BrokerUnreachable, ConfigError
from split_common.system.servers import free_port
from split_common.transport import connect, parse_address
from split_common.transport.address import is_local, masked, parse_redis
from split_common.transport.redis.answers import PASSWORD_VARIABLE
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.options import SENTINEL_PASSWORD_VARIABLE
from split_common.trust.fleet import load_fleet
from valkeys import Valkey, running_cluster, running_sentinel, running_valkey, tls_before
from wiretap import LATE, SOON, Setting, States, run_steps, step, wait_until

STEPS = 40


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with running_valkey() as running:
        yield running


@pytest.fixture(scope="module")
def expected(setting: Setting, server: Valkey) -> list[bytes]:
    with setting.worker(server.address), setting.client(server.address) as client:
        return run_steps(client, STEPS)


# --- addresses ---------------------------------------------------------------------------------------------


def test_addresses() -> None:
    sentinel = parse_redis("rediss+sentinel://u:p@a:1,[::1]:2/queue/3?ssl_ca_certs=/ca")
    assert (sentinel.kind, sentinel.tls, sentinel.service, sentinel.database) == ("sentinel", True, "queue", 3)
    assert sentinel.hosts == (("a", 1), ("::1", 2))
    assert (sentinel.user, sentinel.password) == ("u", "p")
    assert parse_redis("redis+sentinel://a:1/queue").service == "queue"
    assert parse_redis("redis+cluster://a:1,b:2").hosts == (("a", 1), ("b", 2))
    assert parse_address("redis://h:6379/2") == "redis://h:6379/2"
    for wrong in (
        "redis://h",
        "redis://",
        "redis://h:0",
        "redis://a:1,b:2",
        "redis://h:1/x",
        "redis://h:1/service/0",
        "redis+sentinel://a:1",
        "redis+sentinel://a:1/",
        "redis+cluster://a:1/3",
        "redis+unknown://a:1",
    ):
        with pytest.raises(ConfigError):
            parse_address(wrong)


@pytest.mark.parametrize(
    "address",
    [
        "redis://user:se@cret@h:1",
        "redis://:secret@h",
        "redis://user:sec?ret@h:1/0",
        "redis://h:1/x?password=secret",
        "redis://h:1/x?password=a@secret",
        "http://user:secret@h",
        "redis+sentinel://:secret@h:1?sentinel_password=secret",
    ],
)
def test_no_message_holds_a_password(address: str) -> None:
    assert "secret" not in masked(address)
    with pytest.raises(ConfigError) as caught:
        connect(address, load_fleet(), load_fleet().identity("device"))
    assert "secret" not in str(caught.value)
    assert "cret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("redis://127.0.0.1:1", True),
        ("redis://u:p@localhost:1/0", True),
        ("redis+cluster://[::1]:1,127.0.0.1:2", True),
        ("redis+cluster://127.0.0.1:1,10.0.0.1:2", False),
        ("rediss://127.0.0.1@10.0.0.1:1", False),
        ("redis+sentinel://cache:1/queue", False),
    ],
)
def test_this_machines_own_keys_stay_on_it(address: str, local: bool) -> None:
    assert is_local(address) == local
    if not local:
        with pytest.raises(ConfigError, match="keys init"):
            connect(address, load_fleet(), load_fleet().identity("device"))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("redis://127.0.0.1:1?sockettimeout=3", "sockettimeout"),
        ("redis+cluster://127.0.0.1:1?sockettimeout=3", "sockettimeout"),
        ("redis+sentinel://127.0.0.1:1/queue?sockettimeout=3", "sockettimeout"),
        ("redis://127.0.0.1:1?db=x", "db"),
        ("redis://127.0.0.1:1?db=3", "db"),
        ("redis://127.0.0.1:1?socket_timeout=-1", "socket_timeout"),
        ("redis+cluster://127.0.0.1:1?socket_timeout=nan", "socket_timeout"),
        ("redis+sentinel://127.0.0.1:1/queue?socket_connect_timeout=1e999", "socket_connect_timeout"),
        ("redis://127.0.0.1:1?protocol=9", "protocol"),
        ("redis://127.0.0.1:1?protocol=", "protocol"),
        ("redis://127.0.0.1:1?host=10.0.0.1", "host"),
        ("redis://127.0.0.1:1?decode_responses=1", "decode_responses"),
        ("redis://127.0.0.1:1?max_connections=0", "max_connections is at least 1"),
        ("redis://127.0.0.1:1?health_check_interval=-1", "health_check_interval is at least 0"),
        ("rediss://127.0.0.1:1?ssl_ca_certs=/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("rediss+cluster://127.0.0.1:1?ssl_ca_certs=/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("rediss+sentinel://127.0.0.1:1/queue?ssl_certfile=/nowhere/me.pem", "/nowhere/me.pem"),
        (f"rediss://127.0.0.1:1?ssl_ca_certs={__file__}", "certificate"),
        ("rediss://127.0.0.1:1?ssl_cert_reqs=sometimes", "sometimes"),
        ("rediss://127.0.0.1:1?ssl_ciphers=none-of-these", "cipher"),
        ("rediss://127.0.0.1:1?ssl_min_version=1", "1"),
        # Who gives a certificate believes that there is TLS.
        ("redis://127.0.0.1:1?ssl_ca_certs=ca.pem", "rediss://"),
        ("redis+cluster://127.0.0.1:1?ssl_certfile=me.pem", r"rediss\+cluster://"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_sent(setting: Setting, address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        connect(address, setting.fleet, setting.fleet.identity("device"))


@pytest.mark.parametrize(
    "address",
    [
        "redis://:qzx%E9vwk@h:1",
        "redis://qzx%E9vwk:x@h:1",
        "redis+cluster://:qzx%FFvwk@h:1",
        "redis://h:1?password=qzx%E9vwk",
        "redis+sentinel://h:1/queue?sentinel_password=qzx%E9vwk",
        "redis://:qzx\udce9vwk@h:1",
    ],
)
def test_secrets_that_are_not_utf8_are_refused(setting: Setting, address: str) -> None:
    with pytest.raises(ConfigError, match=r"not UTF-8.*%C3%A9") as caught:
        connect(address, setting.fleet, setting.fleet.identity("device"))
    assert "qzx" not in str(caught.value)
    assert "vwk" not in str(caught.value)


def test_options_of_clusters_alone_are_fine(setting: Setting) -> None:
    address = "redis+cluster://127.0.0.1:1?require_full_coverage=1&socket_keepalive=1"
    connect(address, setting.fleet, setting.fleet.identity("device")).close()


@pytest.mark.parametrize(
    "address",
    [
        "redis://device-1:secret@queue.example.org:1",
        "redis+cluster://device-1:secret@127.0.0.1:1,10.0.0.1:2",
        "redis+sentinel://10.0.0.1:1/queue?sentinel_password=secret",
        "redis://10.0.0.1:1?password=secret",
        "redis://10.0.0.1:1?password=secret&insecure=0",
    ],
)
def test_a_password_does_not_travel_in_the_clear_unless_asked_for(setting: Setting, address: str) -> None:
    me = setting.fleet.identity("device")
    with pytest.raises(ConfigError, match="unencrypted") as caught:
        connect(address, setting.fleet, me)
    assert "secret" not in str(caught.value)
    joint = "&" if "?" in address else "?"
    for fine in (
        f"{address.replace('insecure=0', 'x=')}{joint}insecure=1",
        address.replace("redis", "rediss", 1),
        address.replace("10.0.0.1", "127.0.0.1").replace("queue.example.org", "localhost"),
    ):
        connect(fine, setting.fleet, me).close()


def test_neither_does_one_from_the_environment(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    me = setting.fleet.identity("device")
    for name, address in (
        (PASSWORD_VARIABLE, "redis://10.0.0.1:1"),
        (SENTINEL_PASSWORD_VARIABLE, "redis+sentinel://10.0.0.1:1/queue"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, "secret")
            with pytest.raises(ConfigError, match="unencrypted"):
                connect(address, setting.fleet, me)
        connect(address, setting.fleet, me).close()


@pytest.mark.parametrize(
    "secret", ["qzx/vwk#1", "qzx#vwk", "q:k/v", "\u2100vwk", "q[wk", "4711/q", "a b", "p@ss", "%"]
)
def test_passwords_with_any_sign(setting: Setting, secret: str) -> None:
    """As they are, and encoded."""
    with running_valkey("--requirepass", secret) as server:
        for written in (secret, quote(secret, safe="")):
            with setting.client(server.address.replace("//", f"//:{written}@"), timeout=LATE):
                pass


@pytest.mark.parametrize("address", ["redis://:qzx?vwk@h:1", "redis://u:12?qzx@h:1", "redis://u:12?qzx=1@h:1"])
def test_signs_that_have_to_be_encoded_are_named(setting: Setting, address: str) -> None:
    with pytest.raises(ConfigError, match="%3F") as caught:
        connect(address, setting.fleet, setting.fleet.identity("device"))
    assert "qzx" not in str(caught.value)
    assert "vwk" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["redis:user:secret@h:1", "user:secret@h:1", "tcp://user:secret@h", "zmq:secret@h"]
)
def test_no_secret_is_shown_of_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(address)
    assert "secret" not in str(caught.value)


# --- servers that are not there, or not for us -------------------------------------------------------------


def start(setting: Setting, address: str, timeout: float = 1.0) -> str:
    """What is said when a device cannot use a server."""
    began = time.monotonic()
    with pytest.raises(BrokerUnreachable) as caught, setting.client(address, timeout=timeout):
        pass
    assert time.monotonic() - began < timeout + LATE
    return str(caught.value)


def says(setting: Setting, words: str, address: str) -> bool:
    """Whether that is what is said; a busy machine may need more time to find it out."""
    return any(words in start(setting, address, timeout) for timeout in (1.0, 30.0))


def test_what_is_said_without_a_server(setting: Setting, server: Valkey, tmp_path: Path) -> None:
    port = free_port()
    assert says(setting, f"127.0.0.1:{port}", f"redis://127.0.0.1:{port}")
    assert says(setting, "TLS", f"rediss://127.0.0.1:{server.port}")
    assert says(setting, "queue", f"redis+sentinel://127.0.0.1:{port}/queue")
    assert says(setting, str(port), f"redis+cluster://127.0.0.1:{port}")
    with tls_before(server, tmp_path) as (port, _):
        assert says(setting, "certificate", f"rediss://127.0.0.1:{port}")


def test_passwords(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    with running_valkey("--requirepass", "right") as server:
        for address in (server.address, server.address.replace("//", "//:wrong@")):
            said = start(setting, address, timeout=30.0)
            assert "password" in said
            assert "%40" in said
            assert ":wrong" not in said
        with setting.client(server.address.replace("//", "//:right@")):
            pass
        monkeypatch.setenv(PASSWORD_VARIABLE, "right")
        with setting.client(server.address):
            pass


def refused(setting: Setting, words: str, address: str) -> None:
    """A wrong setting is said at once, and not tried until the time is over."""
    began = time.monotonic()
    with pytest.raises(BrokerUnreachable, match=words) as caught, setting.client(address, timeout=LATE):
        pass
    assert time.monotonic() - began < SOON < LATE
    assert ":secret" not in str(caught.value)


def test_wrong_settings_are_told_apart_from_networks_that_fail(setting: Setting, tmp_path: Path) -> None:
    with running_valkey("--requirepass", "right") as server:
        refused(setting, "user name or password", server.address)
        refused(setting, "user name or password", server.address.replace("//", "//:secret@"))
        refused(setting, "DB index", f"{server.address.replace('//', '//:right@')}/99")
        refused(setting, "not a cluster", server.address.replace("redis://", "redis+cluster://:right@"))
        with tls_before(server, tmp_path) as (port, _):
            refused(setting, "certificate", f"rediss://:right@127.0.0.1:{port}")
            refused(setting, "certificate", f"rediss+cluster://:right@127.0.0.1:{port}")


def test_a_wrong_password_is_not_tried_again_and_again(setting: Setting) -> None:
    first, second = "right", "other"
    with (
        running_valkey("--requirepass", first) as server,
        setting.worker(server.address.replace("//", f"//:{first}@")) as worker,
    ):
        server.client(password=first).config_set("requirepass", second)
        admin = server.client(password=second)
        admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        wait_until(lambda: worker._transport._parts.housekeeper.failure)
        time.sleep(3.0)
        # One for each thread's connection, and again after the pause.
        assert 0 < sum(int(entry["count"]) for entry in admin.acl_log()) < 10
        admin.config_set("requirepass", first)


def test_a_node_of_a_cluster_is_no_single_server(setting: Setting) -> None:
    with running_cluster() as (_, nodes):
        # One of them holds the fleet's common keys.
        assert sum("redis+cluster" in _start_at(setting, node.address) for node in nodes) >= 2


def _start_at(setting: Setting, address: str) -> str:
    try:
        with setting.client(address, timeout=LATE):
            return ""
    except BrokerUnreachable as error:
        return str(error)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_drops_keys_is_refused(setting: Setting, policy: str) -> None:
    with running_valkey("--maxmemory", "100mb", "--maxmemory-policy", policy) as server:
        refused(setting, "noeviction", server.address)
        server.client().config_set("maxmemory-policy", "noeviction")
        with setting.client(server.address):
            pass
        server.client().config_set("maxmemory-policy", policy)
        server.client().config_set("maxmemory", "0")
        with setting.client(server.address):
            pass


def test_a_server_that_takes_nothing_is_told_with_its_reason(setting: Setting) -> None:
    with running_valkey("--min-replicas-to-write", "0") as server:
        client = server.client()
        client.config_set("min-replicas-to-write", "1")
        assert says(setting, "NOREPLICAS", server.address)
        client.config_set("min-replicas-to-write", "0")
        client.config_set("maxmemory", "1mb")
        assert says(setting, "maxmemory", server.address)
        client.config_set("maxmemory", "0")
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())
        assert says(setting, "replica", server.address)


@pytest.mark.long
def test_the_doctor_looks_at_redis(setting: Setting, server: Valkey) -> None:
    with setting.worker(server.address):
        command = [sys.executable, "-m", "split_common", "doctor", "--keys", str(setting.fleet.path), "--broker"]
        address = server.address.replace("//", "//user:secret@")
        healthy = subprocess.run([*command, server.address], capture_output=True, text=True, timeout=LATE)
        broken = subprocess.run([*command, address], capture_output=True, text=True, timeout=LATE)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert " 2:4 (worker-1" in healthy.stdout
    assert broken.returncode == 1
    assert "secret" not in broken.stdout + broken.stderr


def test_a_broker_is_not_run_for_redis(server: Valkey) -> None:
    command = [sys.executable, "-m", "split_common", "broker", "--bind", server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LATE)
    assert done.returncode == 2
    assert "there is no broker" in done.stderr


# --- TLS, Sentinels, clusters ------------------------------------------------------------------------------


def test_over_tls(setting: Setting, server: Valkey, expected: list[bytes], tmp_path: Path) -> None:
    with tls_before(server, tmp_path) as (port, ca_file):
        address = f"rediss://127.0.0.1:{port}?ssl_ca_certs={ca_file}"
        with setting.worker(address), setting.client(address) as client:
            assert run_steps(client, STEPS) == expected


def test_in_a_cluster(setting: Setting, expected: list[bytes]) -> None:
    with running_cluster() as (address, nodes), setting.worker(address) as one:
        with setting.worker(address) as other, setting.client(address) as client:
            for _ in range(3):
                assert run_steps(client, STEPS) == expected
            assert one.counters["steps"] + other.counters["steps"] == 3 * (STEPS + 1)
            with contextlib.ExitStack() as stack:
                # So many lanes that it is hardly possible that all fall to one node.
                for _ in range(10):
                    stack.enter_context(setting.client(address))
                used = [node for node in nodes if node.client().dbsize()]
            assert len(used) > 1, "all keys fell to one node"
        wait_until(lambda: sum(length for node in nodes for length in streams(node).values()) == 0)


def test_a_cluster_that_moves_slots_loses_nothing(setting: Setting, expected: list[bytes]) -> None:
    """Before, while and after the keys have moved; those of the worker, the device and the fleet."""
    keys = Keys(setting.fleet.operator_key)
    with (
        running_cluster() as (address, nodes),
        setting.worker(address) as worker,
        setting.client(address, timeout=LATE) as client,
    ):
        session = client.open_session()
        answers, place = [session.call([step(0, 7)])[0][1]], 7

        def go_on() -> None:
            nonlocal place
            for _ in range(3):
                answers.append(session.call([step(place)])[0][1])
                place += 1

        lanes = [worker._transport._parts.lease.lane, client.transport._parts.lease.lane]
        for key in (*lanes, keys.boot):
            move_slot_of(nodes, key, go_on)
        with setting.client(address) as late:
            assert run_steps(late, STEPS) == expected
        assert [States(answer) for answer in answers] == expected[: len(answers)]
        assert worker.counters["channels"] == 2


def move_slot_of(nodes: list[Valkey], key: str, meanwhile: Callable[[], None]) -> None:
    """Moves the slot of a key to another node, as an operator would."""
    by_id = {node.client().execute_command("CLUSTER", "MYID"): node for node in nodes}
    slot = nodes[0].client().execute_command("CLUSTER", "KEYSLOT", key)
    source = next(node for node in nodes if holds(node, slot))
    target = next(node for node in nodes if node is not source)
    ids = {id(node): name for name, node in by_id.items()}
    target.client().execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[id(source)])
    source.client().execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[id(target)])
    meanwhile()
    for name in source.client().execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.client().execute_command("MIGRATE", "127.0.0.1", target.port, name, 0, 5000)
    meanwhile()
    for node in (target, source, *nodes):
        node.client().execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[id(target)])
    meanwhile()


def holds(node: Valkey, slot: int) -> bool:
    """Whether a slot is a node's, by its own word."""
    shards = node.client().execute_command("CLUSTER", "SLOTS")
    return any(begin <= slot <= end and port == node.port for begin, end, (_, port, *_), *_ in shards)


def test_a_failover_loses_nothing(setting: Setting, expected: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with running_sentinel() as (address, master, replica), contextlib.ExitStack() as stack:
        stack.enter_context(setting.worker(address))
        client = stack.enter_context(setting.client(address, timeout=30.0))
        session = client.open_session()
        answers = [session.call([step(0, 7)])[0][1]]
        with ThreadPoolExecutor(1) as pool:

            def go_on() -> None:
                for i in range(STEPS):
                    if i == 6:
                        killing.set()
                    answers.append(session.call([step(7 + i)])[0][1])
                    time.sleep(0.05)
                    if i == STEPS // 2:
                        # It does not get to its end before.
                        assert killed.wait(LATE)

            killing, killed = threading.Event(), threading.Event()
            work = pool.submit(go_on)
            assert killing.wait(LATE)
            master.kill()
            killed.set()
            work.result(LATE)
        assert replica.client().info()["role"] == "master"
        assert [bytes(answer) for answer in answers] == expected


def streams(server: Valkey) -> dict[bytes, int]:
    client = server.client()
    return {key: client.xlen(key) for key in client.keys("ls:*") if client.type(key) == b"stream"}
