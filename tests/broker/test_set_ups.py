"""Which workers count as silent, and for which devices, by what the broker sees of channels' set-ups."""

from __future__ import annotations

import pytest

from split_broker.peer_queue import Peer
from split_broker.set_ups import SetUps
from split_common.protocol import headers
from split_common.protocol.headers import RelayKind
from split_common.transport.placement import PASS_OVER

DEVICES = {name: Peer(name.encode().ljust(8), b"", "device", name[0]) for name in ("d", "d2", "e")}
WORKERS = {name: Peer(name.encode().ljust(8), b"", "worker", name) for name in ("a", "b")}


def play(events: str) -> tuple[SetUps, float]:
    """Lets events happen, one each second.

    Args:
        events: `d?1` device d asks for channel 1; `d<a` its open goes to worker a; `d>a1` it ends the set-up of
            channel 1 there (`FINISH`); `d=a1` it sends a request over it.
    """
    set_ups, now = SetUps(), 0.0
    for now, event in enumerate(events.split()):
        name = next(name for name in sorted(DEVICES, reverse=True) if event.startswith(name))
        device, (what, *rest) = DEVICES[name], event.removeprefix(name)
        if what == "?":
            set_ups.asked(device, int(rest[0]), now)
        elif what == "<":
            set_ups.given(device, WORKERS[rest[0]])
        else:
            kind = RelayKind.FINISH if what == ">" else RelayKind.REQUEST
            worker = WORKERS[rest[0]]
            set_ups.sent(device, worker, headers.Relay(worker.id, device.id, kind, int(rest[1])), now)
    return set_ups, now


@pytest.mark.parametrize(
    ("events", "silent"),
    [
        # An open is given, and nothing comes of it: that alone is not evidence.
        ("d?1", ""),
        ("d?1 d<a", ""),
        ("d?1 d<a d?2", ""),
        # The device says so by asking again; all processes of its member are believed, and no one else's.
        ("d?1 d<a d?1", "d:a d2:a"),
        ("d?1 d<a d?1 d<b d?1", "d:a d:b d2:a d2:b"),
        ("d?1 e?1 d<a e?1", ""),
        # While an open waits for room, nobody owes it an answer.
        ("d?1 d?1 d?1", ""),
        # A worker that answers an open, and then not its end.
        ("d?1 d<a d>a1", ""),
        ("d?1 d<a d>a1 d>a1", "d:a d2:a"),
        ("d?1 d<a d?1 d<b d>b1 d>b1", "d:a d:b d2:a d2:b"),
        # A request over the channel says that it was set up, also if the answer came late.
        ("d?1 d<a d>a1 d=a1", ""),
        ("d?1 d<a d?1 d<b d>a1 d=a1", ""),
        ("d?1 d<a d?1 d<b d>b1 d=b1", "d:a d2:a"),
        # Not one over another channel, or before the end of the set-up.
        ("d?1 d<a d?1 d=a1", "d:a d2:a"),
        ("d?1 d<a d?1 d<a d>a1 d=a2", "d:a d2:a"),
        # Later repetitions are about a channel that is set up.
        ("d?1 d<a d>a1 d=a1 d>a1 d>a1", ""),
    ],
)  # fmt: skip
def test_only_the_device_says_who_is_silent(events: str, silent: str) -> None:
    set_ups, now = play(events)
    found = {f"{name}:{worker}" for name, device in DEVICES.items() for worker in set_ups.silent(device, now)}
    assert found == set(silent.split())


def test_nothing_is_left_of_devices_that_are_gone_and_of_old_silence() -> None:
    set_ups, now = play("d?1 d<a d?1 e?1")
    assert len(set_ups) == 2
    for device in DEVICES.values():
        set_ups.forget(device.id)
    assert len(set_ups) == 0
    assert set_ups.silent(DEVICES["d"], now + PASS_OVER) == set()
    assert set_ups.silent(DEVICES["d"], now + 1000) == set()
    assert not set_ups._silences


def test_an_open_that_is_asked_again_keeps_its_time() -> None:
    set_ups, device = SetUps(), DEVICES["d"]
    assert [set_ups.asked(device, channel, now) for channel, now in ((1, 5.0), (1, 6.0), (2, 7.0), (1, 8.0))] == [
        *(5.0, 5.0, 7.0, 8.0),
    ]
