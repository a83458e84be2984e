"""Redis as it is run: over TLS, with passwords, under Sentinels, as a cluster; and what is said without it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from split_common.errors import BrokerUnreachable, ConfigError
from split_common.system.servers import free_port
from split_common.transport import connect, parse_address
from split_common.transport.address import is_local, masked, parse_redis
from split_common.transport.redis.server import PASSWORD_VARIABLE
from split_common.trust.fleet import load_fleet
from valkeys import Valkey, running_cluster, running_sentinel, running_valkey, tls_before
from wiretap import LATE, Setting, run_steps, step, wait_until

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


def test_an_unknown_option_is_named(setting: Setting) -> None:
    for address in ("redis://127.0.0.1:1?sockettimeout=3", "redis://127.0.0.1:1?db=x"):
        with pytest.raises(ConfigError, match=r"option|argument|db"):
            connect(address, setting.fleet, setting.fleet.identity("device"))


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
            assert "wrong" not in said.replace("WRONGPASS", "").replace("wrong number", "")
        with setting.client(server.address.replace("//", "//:right@")):
            pass
        monkeypatch.setenv(PASSWORD_VARIABLE, "right")
        with setting.client(server.address):
            pass


def test_the_doctor_looks_at_redis(setting: Setting, server: Valkey) -> None:
    with setting.worker(server.address):
        command = [sys.executable, "-m", "split_common", "doctor", "--keys", str(setting.fleet.path), "--broker"]
        address = server.address.replace("//", "//user:secret@")
        healthy = subprocess.run([*command, server.address], capture_output=True, text=True, timeout=LATE)
        broken = subprocess.run([*command, address], capture_output=True, text=True, timeout=LATE)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert "layers 2:4" in healthy.stdout
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
            used = [node for node in nodes if node.client().dbsize()]
            assert len(used) > 1, "all keys fell to one node"
        wait_until(lambda: sum(length for node in nodes for length in streams(node).values()) == 0)


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
