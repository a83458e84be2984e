"""The sizes of decoding steps do not follow what was drafted, accepted or forced."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import tiny
from fleet import TRANSPORTS, joined, replaced, running_broker, using
from split_common.engine.scheduler import DECODE_TOKENS
from split_common.errors import Malformed
from split_common.models.codecs import CODECS
from split_common.models.tensors import to_bytes
from split_common.protocol import encoding, payloads
from split_common.protocol.capabilities import CAPABILITIES, PADDED_STEPS
from split_common.protocol.handshake import DeviceHandshake, WorkerHandshake
from split_common.protocol.headers import RelayKind
from split_device import SplitModelForCausalLM
from split_device.generation.constraint import Grammars
from split_device.generation.generator import Generator, Request
from split_device.generation.structured import StructuredOutputs
from split_device.models.prepared import StepContext
from split_device.sessions import channels
from split_device.sessions.chunks import cut, steady
from split_device.sessions.places import PlacedRun
from split_device.sessions.session import RemoteSession
from split_device.speculation.room import ROOMS, Room
from split_device.speculation.speculation import Speculation
from split_worker import worker as worker_module
from wiretap import LATE

pytestmark = pytest.mark.usefixtures("patient_queue")

WITHOUT = {"capabilities": CAPABILITIES - {PADDED_STEPS}}
TOKENS = 24
#: Repetitions, so that every drafter finds something.
PROMPT = [5, 17, 17, 33, 17, 17, 33]
TEXT = "said-by-the-grammar-"
FORCED = TEXT + "and-longer-than-any-draft-may-be"


class Tap:
    """What the queue sees of sessions' steps and their answers; and what the steps hold, which it does not see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        #: By session, epoch and sequence number.
        self.steps: dict[tuple[Any, ...], payloads.Step] = {}
        self.sizes: dict[RelayKind, dict[tuple[Any, ...], int]] = {RelayKind.REQUEST: {}, RelayKind.REPLY: {}}
        seal, reply = RemoteSession._seal, worker_module.Worker._reply

        def sealing(session: RemoteSession, payload: payloads.Payload, tensor: Any) -> Any:
            return self._saw(seal(session, payload, tensor), payload)

        def replying(worker: Any, *arguments: Any) -> Any:
            return self._saw(reply(worker, *arguments))

        monkeypatch.setattr(RemoteSession, "_seal", sealing)
        monkeypatch.setattr(worker_module.Worker, "_reply", replying)

    def _saw(self, frames: Any, payload: Any = None) -> Any:
        header, body = frames
        key = header.session, header.epoch, header.seq
        if isinstance(payload, payloads.Step):
            self.steps[key] = payload
        self.sizes[header.kind][key] = len(body)
        return frames

    def decoding(self) -> dict[tuple[Any, ...], payloads.Step]:
        """All steps but the first one of each session and epoch, which has its prompt, and but replays."""
        first: dict[tuple[Any, ...], int] = {}
        for *session, seq in self.steps:
            first[*session] = min(seq, first.get((*session,), seq))
        steps = {key: step for key, step in self.steps.items() if key[2] > first[key[:2]]}
        return {key: step for key, step in steps.items() if getattr(step, "outputs", None) != []}

    def seen(self, session: Any = None) -> tuple[set[int], set[int]]:
        """The sizes of all decoding steps, or of those of one session, and of their answers."""
        up, down = self.sizes[RelayKind.REQUEST], self.sizes[RelayKind.REPLY]
        keys = {key for key in self.decoding() if session in (None, key[0])}
        return {up[key] for key in keys}, {down[key] for key in keys if key in down}

    @property
    def tokens(self) -> list[int]:
        """How many tokens the decoding steps had."""
        return [step.tokens for step in self.decoding().values()]


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Tap:
    return Tap(monkeypatch)


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as broker:
        yield broker.address


@pytest.fixture(scope="module")
def grammars(checkpoint: Path) -> Grammars:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return Grammars(tokenizer, tiny.VOCABULARY, {tokenizer.eos_token_id})


@pytest.fixture(scope="module")
def wanted(unsplit: Any) -> list[int]:
    found = unsplit.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def greedy(tokens: int = TOKENS) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens)


def forced(grammars: Grammars, text: str, speculate: str) -> Request:
    """The text comes after a letter that is free."""
    constraint = grammars.constraint(StructuredOutputs(regex=f"[ab]{text}[ab].*"))
    return Request(PROMPT, greedy(len(text) + 8), constraint=constraint, speculate=speculate)


def generated(model: Any, *speculate: str) -> list[list[int]]:
    """An answer with each drafter, one after the other."""
    with Generator(model) as generator:
        return [generator.submit(Request(PROMPT, greedy(), speculate=each)).result(LATE) for each in speculate]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sizes_say_nothing_of_drafts(
    transport: str, checkpoint: Path, wanted: list[int], grammars: Grammars, tap: Tap
) -> None:
    with using(transport), running_broker() as broker, joined(broker.address, checkpoint) as (model, _):
        drafters = ("ngram", "suffix", "recycle")
        assert generated(model, *drafters) == [wanted] * len(drafters)
        with Generator(model) as generator:
            for text in (TEXT, FORCED):
                generator.submit(forced(grammars, text, "ngram")).result(LATE)
    assert {1, 2, DECODE_TOKENS} <= {*tap.tokens}
    for session in {key[0] for key in tap.decoding()}:
        # Trees have room for more tokens than chains.
        ups, downs = tap.seen(session)
        assert len(ups) == len(downs) == 1
        assert min(*ups, *downs) > DECODE_TOKENS * 32 * 4


def test_the_sizes_of_auto_follow_its_room_alone(
    broker: str, checkpoint: Path, wanted: list[int], grammars: Grammars, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = itertools.cycle(ROOMS)

    def choose(room: Room, *_: object) -> None:
        room.tokens, room._left = next(rooms), 3.0

    # In a test, how long cycles take says nothing.
    monkeypatch.setattr(Room, "choose", choose)
    monkeypatch.setattr(Speculation, "_choose", lambda _self, _begun, limit, *_: (max(0, limit), False))
    with joined(broker, checkpoint) as (model, _):
        assert generated(model, *["auto"] * 6) == [wanted] * 6
        for kind, seen in tap.sizes.items():
            sizes: dict[int, set[int]] = defaultdict(set)
            for key, step in tap.decoding().items():
                room = getattr(step, "room", 1)
                assert step.tokens <= room
                if key in seen:
                    sizes[room].add(seen[key])
            assert sizes.keys() == {*ROOMS}, kind
            assert [len(each) for each in sizes.values()] == [1] * len(ROOMS)
        assert len({*tap.tokens}) > 2
        tap.steps.clear()
        with Generator(model) as generator:
            generator.submit(forced(grammars, TEXT, "auto")).result(LATE)
        # What a grammar forces goes in one trip.
        assert {step.room for step in tap.decoding().values()} == {DECODE_TOKENS}  # type: ignore[attr-defined]


def test_what_a_grammar_forces_is_one_trip_in_messages_of_one_size(
    broker: str, checkpoint: Path, grammars: Grammars, tap: Tap
) -> None:
    with joined(broker, checkpoint) as (model, _), Generator(model, speculate="off") as generator:
        generation = generator.submit(Request(PROMPT, greedy(6), speculate="off"))
        generation.result(LATE)
        plain = tap.seen()
        assert [len(sizes) for sizes in plain] == [1, 1]
        tap.steps.clear()
        generator.submit(forced(grammars, FORCED, "off")).result(LATE)
        # A message for 16 of the tokens, and one for the rest.
        assert generator.counters["steps"] < len(tap.steps) + 6
        assert max(tap.tokens) == DECODE_TOKENS
        assert [len(sizes) for sizes in tap.seen()] == [1, 1]


def test_assisted_generate(broker: str, checkpoint: Path, wanted: list[int], tap: Tap) -> None:
    with joined(broker, checkpoint) as (model, _):
        prompt = torch.tensor([PROMPT])
        found = model.generate(prompt, generation_config=greedy(), prompt_lookup_num_tokens=20)
        assert found[0, len(PROMPT) :].tolist() == wanted
    assert len({*tap.tokens}) > 1
    assert {step.room for step in tap.decoding().values()} == {21}  # type: ignore[attr-defined]
    assert [len(sizes) for sizes in tap.seen()] == [1, 1]


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "exact"])
def test_codecs(broker: str, checkpoint: Path, wanted: list[int], codec: str, tap: Tap) -> None:
    """Lossless states have no size of their own, so steps that must not differ travel as they are."""
    with joined(broker, checkpoint, codec=codec) as (model, _):
        found = generated(model, "recycle", "off")
        if codec == "lossless":
            assert found == [wanted, wanted]
    codecs = {getattr(step, "codec", "exact") for step in tap.decoding().values()}
    assert codecs == {"exact" if codec == "lossless" else codec}
    for session in {key[0] for key in tap.steps}:
        assert [len(sizes) for sizes in tap.seen(session)] == [1, 1]


def test_sizes_follow_tokens_where_that_is_asked_for(
    broker: str, checkpoint: Path, wanted: list[int], tap: Tap
) -> None:
    with joined(broker, checkpoint, pad_steps=False) as (model, _):
        assert generated(model, "ngram", "suffix") == [wanted] * 2
    assert not any(isinstance(step, payloads.PaddedStep) for step in tap.steps.values())
    assert min(map(len, tap.seen())) > 1


@pytest.mark.parametrize("old", ["device", "worker"])
def test_older_peers_are_served_and_named(
    old: str, checkpoint: Path, broker: str, wanted: list[int], tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old == "device":
        monkeypatch.setattr(channels, "DeviceHandshake", functools.partial(DeviceHandshake, **WITHOUT))
    else:
        monkeypatch.setattr(worker_module, "WorkerHandshake", functools.partial(WorkerHandshake, **WITHOUT))
    said: list[str] = []
    with joined(broker, checkpoint, on_notice=said.append) as (model, worker):
        assert generated(model, "off") == [wanted]
        assert not said
        assert generated(model, "ngram", "suffix") == [wanted, wanted]
        assert len(said) == 1
        assert repr(worker.name) in said[0]
        assert "does not pad its answers: the queue sees how many tokens are drafted; update it" in said[0]
    assert not any(isinstance(step, payloads.PaddedStep) for step in tap.steps.values())


def test_on_another_worker(checkpoint: Path, broker: str, wanted: list[int], tap: Tap) -> None:
    with (
        joined(broker, checkpoint) as (model, worker),
        Generator(model, speculate="recycle") as generator,
        replaced(worker, checkpoint, broker, lambda: generator.counters["tokens"] > 8) as strike,
    ):
        assert generator.submit(Request(PROMPT, greedy()), strike).result(LATE) == wanted
        assert model.traffic["replays"] == 1
    assert {key[1] for key in tap.decoding()} == {0, 1}
    assert [len(sizes) for sizes in tap.seen()] == [1, 1]


# --- what a worker refuses -----------------------------------------------------------------------------------


def padded(**fields: Any) -> payloads.PaddedStep:
    known: dict[str, Any] = {"codec": "exact", "size": 3 * 128, "outputs": [0, 1, 2], "room": 4, "padded": 4 * 128}
    return payloads.PaddedStep("float32", 32, [payloads.Run(0, 0, [0, 1, 2])], **{**known, **fields})


HOSTILE = {
    "room for fewer tokens": {"room": 2},
    "an answer larger than the step": {"room": 5},
    "an answer of many MiB": {"room": 2**15},
    "states that exceed it": {"size": 5 * 128, "padded": 5 * 128},
    "bytes that are not there": {"size": 2 * 128},
    "a codec without a size": {"codec": "lossless"},
    "outputs of other tokens": {"outputs": [3]},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_hostile_sizes(setting: tuple[Any, Any], fields: dict[str, Any]) -> None:
    model, worker = setting
    step = padded(**fields)
    data = bytes(to_bytes(torch.ones(5, 32)))[: step.padded]
    with pytest.raises(Malformed):
        model._client.open_session().call([(step, data)])
    assert worker.counters["forwards"] == 0


def test_padding_is_not_looked_at(setting: tuple[Any, Any]) -> None:
    model, _ = setting
    states = bytes(to_bytes(torch.ones(3, 32)))
    answers = [
        model._client.open_session().call([(padded(), states + more)]) for more in (bytes(128), b"\xff" * 128)
    ]
    ((first, one),), ((second, other),) = answers
    assert (first.tokens, bytes(one)) == (second.tokens, bytes(other))
    assert (first.tokens, len(one)) == (3, len(states))


@pytest.fixture
def setting(broker: str, checkpoint: Path) -> Iterator[tuple[Any, Any]]:
    with joined(broker, checkpoint) as pair:
        yield pair


# --- the parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["exact", "int8", "int4"])
def test_a_padded_step_has_one_size(codec: str) -> None:
    sizes = set()
    for tokens in range(1, 17):
        for first, acked in ((0, 0), (2**31 - 17, 2**40)):
            run = payloads.Run(0, first, list(range(first, first + tokens)))
            outputs = list(range(tokens)) if tokens % 2 else []
            used = CODECS[codec].size("bfloat16", tokens, 64)
            most = CODECS[codec].size("bfloat16", 16, 64)
            assert used is not None
            assert most is not None
            assert len(CODECS[codec].encode(torch.ones(tokens, 64, dtype=torch.bfloat16))) == used
            step = payloads.PaddedStep(
                *("bfloat16", 64, [run], None, acked),
                **{"codec": codec, "size": used, "outputs": outputs, "room": 16, "padded": most},
            )
            sizes.add(len(encoding.encode_payload(step, bytes(most), overhead=32)))
    assert len(sizes) == 1


def test_steps_are_cut_at_their_room() -> None:
    states, run = torch.zeros(7, 2), PlacedRun(0, 10, torch.arange(10, 17))
    assert [(len(chunk.states), chunk.room) for chunk in cut([run], states, 3, room=3)] == [(3, 3), (3, 3), (1, 3)]
    # Where they may not be cut, they have room for a multiple.
    assert [chunk.room for chunk in cut([run], states, 3, whole_runs=True, room=3)] == [9]
    assert [chunk.room for chunk in cut([run], states, 3)] == [None] * 3


def test_which_steps_have_room() -> None:
    exact, lossless, int8 = (CODECS[name] for name in ("exact", "lossless", "int8"))
    assert StepContext().sizes(lossless, 1, True) == (lossless, None)
    assert StepContext(room=16).sizes(lossless, 1, False) == (lossless, None)
    assert StepContext(room=16).sizes(lossless, 1, True) == (exact, 16)
    assert StepContext(room=1).sizes(lossless, 3, True) == (exact, None)
    assert StepContext(room=16).sizes(int8, 3, True) == (int8, 48)
    assert steady(int8) is int8


def test_the_option(run: Any) -> None:
    assert "--no-pad-steps" in run("generate", "--help").out


def test_the_argument(broker: str, checkpoint: Path) -> None:
    with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker, pad_steps=False) as model:
        assert model._client.pad_steps is False
