"""A worker's channels: set up by their own members alone, and shared between members."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from split_common.errors import AuthenticationError, Busy
from split_common.protocol import headers
from split_common.protocol.handshake import DeviceHandshake, WorkerHandshake
from split_common.transport import new_peer_id
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Certificate, ModelScope, Role
from split_worker import channels, set_ups
from split_worker.channels import ChannelTable
from split_worker.set_ups import ChannelId, SetUps

SERVICE = headers.Service(bytes(32), 2, 4)


class Setting:
    """A worker's table of channels, and devices that set channels up."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.worker = fleet.read_identity("worker-1")
        self.closed: list[ChannelId] = []
        self.set_ups = SetUps(
            lambda hello: WorkerHandshake(self.worker, self.verify, SERVICE, hello), self.fleet.roster
        )
        self.table = ChannelTable(self.set_ups, self.closed.append)

    def verify(self, certificate: bytes, role: Role) -> Certificate:
        return self.fleet.verify(certificate, role, ModelScope(SERVICE.root, SERVICE.first, SERVICE.last))

    def hello(self, member: str) -> DeviceHandshake:
        return DeviceHandshake(self.fleet.read_identity(member), self.verify, SERVICE, "float32")

    def open(self, member: str, id_: ChannelId | None = None) -> ChannelId:
        id_ = id_ or (new_peer_id(member), 1)
        handshake = self.hello(member)
        finish, _ = handshake.finish(self.set_ups.begin(id_, handshake.hello))
        self.table.finish(id_, finish)
        return id_

    def members(self) -> list[str]:
        return sorted(open_.member for open_ in self.table.open.values())


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    fleet = Fleet.create(tmp_path_factory.mktemp("fleet") / "keys")
    for number in (2, 3):
        fleet.add_member("device", f"device-{number}")
    return fleet


@pytest.fixture
def setting(fleet: Fleet) -> Setting:
    return Setting(fleet)


def test_a_set_up_under_anothers_id_leaves_that_ones_channel(setting: Setting) -> None:
    id_ = setting.open("device-1")
    channel = setting.table.open[id_]
    for _ in range(2):
        with pytest.raises(AuthenticationError, match="peer id of another member"):
            setting.open("device-2", id_)
    assert setting.table.open[id_] is channel
    assert not setting.closed
    # The member itself may set it up again.
    setting.open("device-1", id_)
    assert setting.closed == [id_]


def test_a_peer_id_of_no_device_is_refused(setting: Setting) -> None:
    for id_ in (bytes(8), new_peer_id("worker-1"), new_peer_id("device-9")):
        with pytest.raises(AuthenticationError, match="no device"):
            setting.set_ups.begin((id_, 1), setting.hello("device-1").hello)


def test_a_revoked_devices_id_is_refused(tmp_path: Path) -> None:
    setting = Setting(Fleet.create(tmp_path / "keys"))
    setting.open("device-1")
    setting.fleet.revoke("device-1")
    with pytest.raises(AuthenticationError, match="no device"):
        setting.set_ups.begin((new_peer_id("device-1"), 1), setting.hello("device-1").hello)


def test_the_member_that_begins_most_set_ups_loses_its_own(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_ups, "MAX_HALF_OPEN", 4)
    honest = (new_peer_id("device-1"), 1)
    handshake = setting.hello("device-1")
    answer = setting.set_ups.begin(honest, handshake.hello)
    for _ in range(20):
        setting.set_ups.begin((new_peer_id("device-2"), 1), setting.hello("device-2").hello)
    assert len(setting.set_ups.half_open) == 4
    setting.table.finish(honest, handshake.finish(answer)[0])
    assert setting.members() == ["device-1"]


def test_the_member_that_begins_set_ups_too_fast_waits(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split_common.trust.shares.time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(set_ups, "SET_UP_BURST", 4.0)
    setting = Setting(setting.fleet)
    hello, id_ = setting.hello("device-2").hello, (new_peer_id("device-2"), 1)
    for _ in range(8):
        setting.set_ups.begin(id_, hello)
    with pytest.raises(Busy):
        setting.set_ups.begin(id_, hello)
    for number in range(4):
        setting.open("device-1", (new_peer_id("device-1"), number))


def test_the_member_with_most_channels_loses_its_own(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_CHANNELS", 6)
    first = setting.open("device-1")
    second = setting.open("device-3")
    for _ in range(20):
        setting.open("device-2")
    assert {first, second} <= set(setting.table.open)
    for _ in range(5):
        setting.open("device-1")
    assert setting.members() == ["device-1"] * 2 + ["device-2"] * 3 + ["device-3"]
    assert second in setting.table.open


def test_what_a_channel_remembers_is_bounded(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_EPOCHS", 3)
    monkeypatch.setattr(channels, "MAX_MEMBER_EPOCHS", 7)
    ids = [setting.open("device-2") for _ in range(3)]
    other = setting.open("device-1")
    assert setting.table.remember(other, 0, 0)
    for id_ in ids:
        assert [setting.table.remember(id_, session, 0) for session in range(4)] == [True, True, True, False]
        # Of a session that is remembered the epoch may rise.
        assert setting.table.remember(id_, 2, 5)
    setting.table.close_stale(setting.fleet.roster())
    assert setting.closed == ids[:1]
    assert other in setting.table.open
