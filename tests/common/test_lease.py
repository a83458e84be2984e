"""What a heartbeat finds, by the server's answers and by how long it was away."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from split_common.protocol import headers
from split_common.transport.base import GRACE, HEARTBEAT, QUEUE_BYTES
from split_common.transport.redis import lease as lease_module
from split_common.transport.redis.answers import Refused
from split_common.transport.redis.key_names import Keys
from split_common.transport.redis.lease import LEASE, Found, Lease

BOOT, OTHER_BOOT = b"boot 1", b"boot 2"


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    # The fixture that all tests have makes leases last, so that slow machines keep theirs.
    monkeypatch.setattr(lease_module, "LEASE", LEASE)
    return clock


@pytest.fixture
def lease(clock: Clock) -> Lease:
    def run_allowed(commands: Sequence[Any]) -> list[Any]:
        return [b"OK" for _ in commands]

    connections: Any = SimpleNamespace(run_allowed=run_allowed)
    made = Lease(connections, Keys(bytes(32)), headers.Announce(b"device-1", "device", "device-1"))
    assert made.renewed(clock.now, 0, BOOT) == Found.NOTHING
    assert made.lanes_made == 1
    return made


@pytest.mark.parametrize(
    ("away", "disconnected", "existed", "boot", "found", "lanes"),
    [
        (HEARTBEAT, False, 1, BOOT, Found.NOTHING, 1),
        # The connection was away for a moment: only messages may be lost.
        (HEARTBEAT, True, 1, BOOT, Found.RESET, 1),
        # The lane was lost, though not for long enough that the peer can have been taken for dead.
        (HEARTBEAT, True, 0, BOOT, Found.RESET, 2),
        # The lease ended: those that watch it were told.
        (LEASE, True, 0, BOOT, Found.LEASE_ENDED, 2),
        (LEASE, False, 0, BOOT, Found.LEASE_ENDED, 2),
        # The server has forgotten everything: nobody was told anything.
        (LEASE, True, 0, OTHER_BOOT, Found.RESET, 2),
        (HEARTBEAT, False, 0, OTHER_BOOT, Found.RESET, 2),
        # A key that was deleted means nothing.
        (HEARTBEAT, False, 1, None, Found.NOTHING, 1),
    ],
)
def test_what_a_heartbeat_finds(
    lease: Lease,
    clock: Clock,
    away: float,
    disconnected: bool,
    existed: int,
    boot: bytes | None,
    found: Found,
    lanes: int,
) -> None:
    clock.now += away
    lease.disconnected = disconnected
    assert lease.renewed(clock.now, existed, boot) == found
    assert lease.lanes_made == lanes
    assert not lease.disconnected
    # It is told once.
    clock.now += HEARTBEAT
    assert lease.renewed(clock.now, 1, boot) == Found.NOTHING


def test_missing_peers_are_no_deaths_for_as_long_as_the_server_was_away(lease: Lease, clock: Clock) -> None:
    assert not lease.early
    for away, early in ((0.5, 0.5 + HEARTBEAT), (100.0, GRACE)):
        clock.now += away
        lease.disconnected = True
        lease.renewed(clock.now, 1, BOOT)
        clock.now += early - 0.01
        assert lease.early
        clock.now += 0.02
        assert not lease.early
        lease.renewed(clock.now, 1, BOOT)
    lease.renewed(clock.now, 1, OTHER_BOOT)
    clock.now += GRACE - 0.01
    assert lease.early


def test_a_server_that_changes_its_boot_all_the_time_makes_no_storm(lease: Lease, clock: Clock) -> None:
    found = []
    for number in range(50):
        clock.now += HEARTBEAT / 10
        found.append(lease.renewed(clock.now, 1, b"boot %d" % number))
    assert found.count(Found.RESET) == 5


def test_an_exhausted_lane_is_replaced_and_nothing_is_lost_by_it(lease: Lease, clock: Clock) -> None:
    lease.replace_lane()
    clock.now += HEARTBEAT
    assert lease.renewed(clock.now, 1, BOOT) == Found.NOTHING
    assert lease.lanes_made == 2


def test_a_lane_that_is_flooded_is_emptied(lease: Lease, clock: Clock) -> None:
    for size, lanes in ((2 * QUEUE_BYTES, 1), (2 * QUEUE_BYTES + 1, 2), (None, 2)):
        clock.now += HEARTBEAT
        assert lease.renewed(clock.now, 1, BOOT, size) == Found.NOTHING
        assert lease.lanes_made == lanes


def test_a_peer_that_took_itself_out_was_taken_for_dead(lease: Lease, clock: Clock) -> None:
    lease.end()
    clock.now += HEARTBEAT
    assert lease.renewed(clock.now, 0, BOOT) == Found.LEASE_ENDED


def test_a_server_of_another_kind_is_refused(lease: Lease, clock: Clock) -> None:
    from redis.exceptions import ResponseError

    with pytest.raises(Refused, match="not Redis 7"):
        lease.renewed(clock.now, 1, ResponseError("syntax error"))
