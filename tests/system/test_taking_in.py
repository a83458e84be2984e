"""What a worker does with requests while a forward runs: all that needs no forward, on the CPU as on a GPU.

The body's forward blocks until the test lets it go on, so nothing here depends on how long something takes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_hostile import Bench

import tiny
import tiny_diffusion
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.codecs import encode
from split_common.models.denoisers.registry import read_denoiser_spec
from split_common.protocol import encoding, headers, payloads
from split_common.protocol.channel import EpochKeys
from split_worker.bodies.denoiser import DenoiserBody
from split_worker.requests import REQUEST_BYTES
from wiretap import LATE, Setting, step, wait_until

#: Requests of a session in order: payloads, and the bytes of their tensors.
Requests = list[tuple[payloads.Payload, Any]]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def denoiser(fleet: Setting, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The fleet, with a body of an image model in place of its own."""
    spec = read_denoiser_spec(Checkpoint.resolve(tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))))
    split = spec.split("C")
    return SimpleNamespace(
        fleet=fleet.fleet,
        own_fleet=fleet.own_fleet,
        service=headers.Service(bytes(32), split.first, split.last),
        body=DenoiserBody(spec, split, torch.device("cpu")),
    )


def image_requests() -> Requests:
    embeddings, data = encode(torch.ones(1, 4, 2 * tiny_diffusion.TEXT))
    states = [encode(tensor) for tensor in (torch.ones(1, 32, 16, 16), torch.ones(1, 128))]
    whole = b"".join(part for _, part in states)
    arrays = [array for array, _ in states]
    return [
        (payloads.Conditioning(bytes(32), [embeddings]), data),
        (payloads.TensorPart(0, 1000), whole[:1000]),
        (payloads.Denoise(bytes(32), [0], arrays, "float32", sent=1000), whole[1000:]),
    ]


@pytest.fixture(params=["text", "image"])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Bench, Requests]]:
    setting = request.getfixturevalue("fleet" if request.param == "text" else "denoiser")
    bench = Bench(setting)
    yield bench, [step(0)] if request.param == "text" else image_requests()
    bench.worker.stop()


class Gate:
    """Makes a body's forwards wait."""

    def __init__(self, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        launch = body.launch

        def waiting(runs: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(LATE)
            return launch(runs)

        monkeypatch.setattr(body, "launch", waiting)


class Peer:
    """A device of a bench: its sessions' keys, and what was sent to it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.channel = bench.channel(1)
        self._keys: dict[int, EpochKeys] = {}
        self._came: list[tuple[headers.Relay, payloads.AnyReply, bytes]] = []

    def keys(self, session: int) -> EpochKeys:
        if session not in self._keys:
            self._keys[session] = self.channel.epoch_keys(session, 0)
        return self._keys[session]

    def send(self, session: int, requests: Requests, first: int = 0) -> str:
        """Delivers a session's requests, numbered from `first` on. Returns what came of the last one."""
        came = ""
        for seq, (payload, tensor) in enumerate(requests, first):
            came = self.bench.deliver(*self.bench.request(self.keys(session), session, seq, payload, tensor))
        return came

    def came(self, session: int) -> list[tuple[payloads.AnyReply, bytes]]:
        """What was sent to a session so far; session 0 has what belongs to none."""
        for header, body in self.bench.transport.take():
            assert isinstance(header, headers.Relay)
            reply, tensor = encoding.decode_payload(
                self.keys(header.session).open(header, body), encoding.reply_decoder
            )
            self._came.append((header, reply, bytes(tensor)))
        return [(reply, tensor) for header, reply, tensor in self._came if header.session == session]

    def answers(self, session: int, count: int) -> list[bytes]:
        """The tensors of a session's answers, once there are so many."""
        wait_until(lambda: len(self.came(session)) >= count)
        return [tensor for _, tensor in self.came(session)]

    def refusals(self) -> list[str]:
        """Why requests were refused outside their sessions."""
        return [reply.reason for reply, _ in self.came(0) if isinstance(reply, payloads.Refusal)]


def test_requests_are_taken_in_while_a_forward_runs(
    case: tuple[Bench, Requests], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, requests = case
    worker, peer, count = bench.worker, Peer(bench), len(requests)
    close: Requests = [(payloads.Close(), b"")]
    peer.send(1, requests)
    wanted = peer.answers(1, count)[-1]
    gate = Gate(worker._body, monkeypatch)
    peer.send(2, requests)
    assert gate.reached.wait(LATE)
    before = worker.facts()

    # Taken in: opened, in order, and counted.
    assert peer.send(3, requests) == ""
    overhead = peer.keys(3).tag_size
    bodies = [encoding.encode_payload(*request, overhead=overhead) for request in requests]
    waiting = sum(encoding.held_bytes(body) + REQUEST_BYTES for body in bodies)
    assert worker.facts()["sessions"] == before["sessions"] + 1
    assert worker.facts()["queued_bytes"] == before["queued_bytes"] + waiting

    # Checked: what is damaged, or comes before its turn, has no effect.
    header, body = bench.request(peer.keys(4), 4, 0, *requests[0])
    assert bench.deliver(header, body[:-1] + bytes([body[-1] ^ 1])) == "AuthenticationError"
    assert peer.send(4, requests[:1], first=3) == "OutOfOrder"
    assert worker.facts()["sessions"] == before["sessions"] + 1

    # Refused: more than the queue takes, and more sessions than there may be.
    limits = worker._sessions.limits
    with monkeypatch.context() as patch:
        patch.setattr(worker._sessions, "limits", replace(limits, max_queued_bytes=100))
        peer.send(5, requests[:1])
        assert peer.refusals() == ["full"]
        # None of them counts as idle, however slow this machine is.
        patch.setattr(worker._sessions, "limits", replace(limits, max_sessions=2, evict_after=1e9))
        peer.send(6, requests[:1])
        assert peer.refusals() == ["full", "busy"]

    # Canceled: the session is closed, and what it waited for is let go.
    peer.send(3, close, first=count)
    after = worker.facts()
    assert (after["queued_bytes"], after["steps"]) == (before["queued_bytes"], before["steps"])
    assert not gate.opened.is_set()

    # The forward goes on, and its session is answered.
    gate.opened.set()
    assert peer.answers(2, count)[-1] == wanted
    wait_until(lambda: worker.facts()["queued_bytes"] == 0)
    assert not any(isinstance(reply, payloads.Result | payloads.Denoised) for reply, _ in peer.came(3))
    peer.send(7, requests)
    assert peer.answers(7, count)[-1] == wanted
    if worker._body.store is not None:
        for session in (1, 2, 7):
            peer.send(session, close, first=count)
        wait_until(lambda: worker.facts()["kv_tokens_used"] == 0)


def test_a_new_session_gets_the_memory_of_one_that_is_closed(
    fleet: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, though the compute loop can free it only after the forward that runs."""
    bench = Bench(fleet)
    try:
        worker, peer, store = bench.worker, Peer(bench), fleet.body.store
        free = worker._free_tokens()
        peer.send(1, [step(0)])
        peer.answers(1, 1)
        held = store.free_tokens
        assert worker._free_tokens() == held != free
        gate = Gate(fleet.body, monkeypatch)
        peer.send(2, [step(0)])
        assert gate.reached.wait(LATE)
        peer.send(1, [(payloads.Close(), b"")], first=1)
        assert (store.free_tokens, worker._free_tokens()) == (held, free)
        gate.opened.set()
        peer.answers(2, 1)
    finally:
        bench.worker.stop()
