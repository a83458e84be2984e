"""What a hostile broker sees of a generation: nothing that is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

import tiny
from split_broker.peer_queue import BodyBytes, Peer, RoutedMessage
from split_common.protocol import channel as channels
from split_common.protocol import encoding, handshake, headers
from split_device import SplitModelForCausalLM
from wiretap import Setting

#: Length of the needles that are cut out of hidden states, in bytes: two fp32 numbers, never so by chance.
NEEDLE = 8

CANARY = "the canary sings at midnight"
#: Its tokens: one for each letter, all within the tiny model's vocabulary.
PROMPT = [1 + (ord(letter) - 32) % 95 for letter in CANARY]


def token_needles(tokens: list[int]) -> set[bytes]:
    """Four tokens in a row, in each form in which they might travel."""
    needles: set[bytes] = set()
    for start in range(len(tokens) - 3):
        run = tokens[start : start + 4]
        for dtype in (torch.int64, torch.int32, torch.int16):
            needles.add(bytes(torch.tensor(run, dtype=dtype).numpy().tobytes()))
        needles.add(bytes(run))
        needles.add(" ".join(map(str, run)).encode())
        needles.add(",".join(map(str, run)).encode())
        needles.add(msgspec.msgpack.encode(run)[1:])
    return needles


def state_needles(plaintexts: Iterable[bytes]) -> set[bytes]:
    """Pieces of the hidden states in all payloads."""
    needles: set[bytes] = set()
    for body in plaintexts:
        for decoder in (encoding.request_decoder, encoding.reply_decoder):
            try:
                _, tensor = encoding.decode_payload(body, decoder)
            except Exception:
                continue
            needles.update(bytes(tensor[at : at + NEEDLE]) for at in range(0, len(tensor) - NEEDLE, NEEDLE))
    return {needle for needle in needles if len(set(needle)) > 4}


def found(needles: set[bytes], frames: list[bytes]) -> set[bytes]:
    haystack = b"|".join(frames)
    return {needle for needle in needles if needle in haystack}


class Recording:
    """A generation of the canary, as the broker and as its two ends saw it."""

    def __init__(self, setting: Setting, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.frames: list[bytes] = []
        self.plaintexts: list[bytes] = []
        self._patch = patch
        seal = channels.EpochKeys.seal

        def record_plaintext(keys: channels.EpochKeys, header: headers.Relay, plaintext: bytes) -> bytes:
            self.plaintexts.append(plaintext)
            return seal(keys, header, plaintext)

        patch.setattr(channels.EpochKeys, "seal", record_plaintext)
        directory.chmod(0o700)
        with setting.broker(f"ipc://{directory}/b") as broker:
            handle, put = broker._handle, broker._delivery.put

            def record_received(envelope: zmq.Frame, head: bytes, body: BodyBytes) -> None:
                self.frames += [envelope.bytes, head, bytes(memoryview(body))]  # type: ignore[arg-type]
                handle(envelope, head, body)

            def record_sent(peer: Peer, message: RoutedMessage, sender: str = "") -> bool:
                self.frames += [message[0], bytes(memoryview(message[1]))]  # type: ignore[arg-type]
                return put(peer, message, sender)

            patch.setattr(broker, "_handle", record_received)
            patch.setattr(broker._delivery, "put", record_sent)
            with (
                setting.worker(broker.address),
                SplitModelForCausalLM.from_pretrained(
                    setting.checkpoint, broker=broker.address, keys=setting.fleet.path
                ) as model,
            ):
                generated = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)
        self.tokens = generated[0].tolist()
        self.states = state_needles(self.plaintexts)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("fleet"), tiny.save("llama", tmp_path_factory.mktemp("llama")))


def null_cipher(suite: channels.Suite) -> channels.Suite:
    """A cipher that encrypts nothing: what the broker would see without one."""
    tag = bytes(suite.tag_size)
    return dataclasses.replace(
        suite,
        encrypt=lambda plaintext, _data, _nonce, _key: plaintext + tag,
        decrypt=lambda body, _data, _nonce, _key: body[: -len(tag)],
    )


def test_a_hostile_broker_learns_neither_tokens_nor_text_nor_states(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording(setting, tmp_path, monkeypatch)
    assert len(recording.frames) > 200
    assert len(recording.tokens) == len(PROMPT) + 20
    assert len(recording.states) > 500
    assert not found(recording.states, recording.frames)
    assert not found(token_needles(recording.tokens), recording.frames)
    assert not found({CANARY.encode(), CANARY[:8].encode(), CANARY.encode("utf-16-le")}, recording.frames)
    # It does see what it needs: who, to whom, and which service.
    assert found({b"device-1", b"worker-1", setting.manifest.root}, recording.frames)


def test_the_detector_finds_everything_where_nothing_is_encrypted(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = {name: null_cipher(suite) for name, suite in channels.SUITES.items()}
    for module in (channels, handshake):
        monkeypatch.setattr(module, "SUITES", suites)
    recording = Recording(setting, tmp_path, monkeypatch)
    assert found(recording.states, recording.frames) == recording.states
    # And what the protocol never sends, where somebody did send it.
    tokens = torch.tensor(recording.tokens).numpy().tobytes()
    assert found(token_needles(recording.tokens), [*recording.frames, b"x" + tokens])
    assert found({CANARY.encode()}, [*recording.frames, CANARY.encode()])


def test_decode_steps_look_alike_to_the_broker(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording(setting, tmp_path, monkeypatch)
    sizes: dict[headers.RelayKind, set[int]] = {}
    for head, body in zip(recording.frames, recording.frames[1:], strict=False):
        try:
            header = headers.decode_header(head)
        except Exception:
            continue
        if isinstance(header, headers.Relay) and header.session and 0 < header.seq < 19:
            sizes.setdefault(header.kind, set()).add(len(body))
    assert {len(found_sizes) for found_sizes in sizes.values()} == {1}
    assert set(sizes) == {headers.RelayKind.REQUEST, headers.RelayKind.REPLY}
