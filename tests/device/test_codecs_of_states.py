"""Codecs of hidden states over the whole path: negotiation, answers, and replays on another worker."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_replay import GREEDY, PROMPT, REPEATED, fleet_of, strike_at
from transformers import GenerationConfig

import tiny
from fleet import joined, running_broker
from split_common.errors import ConfigError, Malformed, UnsupportedFeature
from split_common.models.codecs import CODECS
from split_common.protocol import payloads
from split_common.protocol.capabilities import CAPABILITIES
from split_common.protocol.channel import Channel
from split_common.protocol.handshake import WorkerHandshake
from split_device import SplitModelForCausalLM
from split_device.generation.generator import Generator, Request
from split_device.sessions.chunks import Chunk
from split_worker import worker as worker_module
from split_worker.bodies.language import Rows
from wiretap import LATE

CODED = ("lossless", "int8", "int4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("codecs"))


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as broker:
        yield broker.address


@pytest.fixture(scope="module")
def unsplit() -> Any:
    return tiny.build("llama")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.Tensor]]:
    """Position and hidden state of each token that workers are sent."""
    found: list[tuple[int, torch.Tensor]] = []
    begin = Rows.begin

    def recording(rows: Rows, step: payloads.Step, states: torch.Tensor, *args: Any) -> Any:
        positions = [position for run in step.rows for position in run.positions]
        found.extend(zip(positions, states.clone(), strict=True))
        return begin(rows, step, states, *args)

    monkeypatch.setattr(Rows, "begin", recording)
    return found


@pytest.mark.parametrize("codec", ["exact", "lossless"])
def test_answers_are_token_identical(broker: str, checkpoint: Path, unsplit: Any, codec: str) -> None:
    wanted = unsplit.generate(PROMPT, **GREEDY)
    with joined(broker, checkpoint, codec=codec) as (model, worker):
        assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
        assert torch.equal(
            model.generate(REPEATED, prompt_lookup_num_tokens=4, **GREEDY), unsplit.generate(REPEATED, **GREEDY)
        )
        greedy = GenerationConfig(**GREEDY, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)
        with Generator(model) as generator:
            generations = [generator.submit(Request(PROMPT[0].tolist(), greedy)) for _ in range(3)]
            tokens = wanted[0, PROMPT.shape[1] :].tolist()
            assert [generation.result(LATE) for generation in generations] == [tokens] * 3
        assert worker.counters["forwards"] > 0


@pytest.mark.parametrize("codec", CODED)
def test_what_a_lost_worker_held_is_replayed_bit_by_bit(
    checkpoint: Path, codec: str, seen: list[tuple[int, torch.Tensor]]
) -> None:
    with fleet_of(checkpoint, codec=codec) as (model, workers):
        wanted = model.generate(PROMPT, **GREEDY)
        with Generator(model, speculate="off") as generator:
            config = GenerationConfig(**GREEDY, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)
            prompt = REPEATED[0].tolist()
            drafters = ("off", "ngram", "suffix-recycle")
            texts = [generator.submit(Request(prompt, config, speculate=name)).result(LATE) for name in drafters]
            assert texts == [texts[0]] * 3
            assert generator.counters["drafted_tokens"] > 0
        seen.clear()
        strike_at(model, workers, {2, 4, 5})
        assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
        assert model.traffic["replays"] == 3
    by_place: dict[int, list[torch.Tensor]] = {}
    for place, state in seen:
        by_place.setdefault(place, []).append(state)
    assert max(map(len, by_place.values())) == 4
    assert all(torch.equal(state, states[0]) for states in by_place.values() for state in states)


def test_fewer_bytes_travel_both_ways(broker: str, checkpoint: Path) -> None:
    prompt = torch.arange(3, 103)[None] % 90
    sent, received = {}, {}
    for codec in CODECS:
        with joined(broker, checkpoint, codec=codec) as (model, _), torch.no_grad():
            model(prompt[:, :1], use_cache=False)
            before = model.traffic
            model(prompt, use_cache=False)
            sent[codec] = model.traffic["bytes_sent"] - before["bytes_sent"]
            received[codec] = model.traffic["bytes_received"] - before["bytes_received"]
    for traffic in (sent, received):
        assert traffic["int4"] < traffic["int8"] < traffic["exact"] / 2
        assert traffic["lossless"] < traffic["exact"]


# --- negotiation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODED)
def test_a_worker_without_the_codec_is_refused_by_name(
    broker: str, checkpoint: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = functools.partial(WorkerHandshake, capabilities=CAPABILITIES - {f"states-{codec}"})
    monkeypatch.setattr(worker_module, "WorkerHandshake", older)
    with joined(broker, checkpoint, codec=codec) as (model, worker):
        with pytest.raises(UnsupportedFeature, match=rf"worker '.+' does not support states-{codec}: .* update it"):
            model.generate(PROMPT, **GREEDY)
        assert worker.counters["forwards"] == worker.counters["refused_malformed"] == 0


def test_a_codec_that_was_not_agreed_on_is_refused(
    broker: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = functools.partial(WorkerHandshake, capabilities=CAPABILITIES - {"states-int8"})
    monkeypatch.setattr(worker_module, "WorkerHandshake", older)
    monkeypatch.setattr(Channel, "require", lambda *_: None)
    with joined(broker, checkpoint, codec="int8") as (model, worker):
        with pytest.raises(Malformed, match="the channel has no states-int8"):
            model.generate(PROMPT, **GREEDY)
        assert worker.counters["forwards"] == 0


def test_an_unknown_codec(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="invalid codec 'int2': expected one of exact, lossless, int8, int4"):
        SplitModelForCausalLM.from_pretrained(checkpoint, codec="int2")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("generate", "x", "--codec", "fp16"), "--codec fp16 is not for texts: choose one of exact, lossless"),
        (("submit", "x", "--codec", "fp16"), "--codec fp16 is not for texts"),
        (
            ("submit", "x", "--image", "--codec", "lossless"),
            "--codec lossless is not for images: choose one of exact",
        ),
        (("chat", "--codec", "int2"), "invalid codec 'int2': expected one of exact, lossless, fp16, int8, int4"),
    ],
)
def test_a_codec_of_other_models_is_refused(run: Any, command: tuple[str, ...], message: str) -> None:
    done = run(*command)
    assert done.code == 2
    assert message in done.err


def test_a_command_with_a_codec(run: Any, checkpoint: Path, broker: str, tmp_path: Path) -> None:
    tiny.save_tokenizer(checkpoint)
    command = ("generate", "Hello", "--model", checkpoint, "--broker", broker, "--max-tokens", 8, "--json")
    with joined(broker, checkpoint) as (_, worker):
        texts = {codec: run(*command, "--codec", codec).json["text"] for codec in ("exact", "none", "lossless")}
        assert len(set(texts.values())) == 1
        assert run(*command, "--codec", "int8").code == 0
        assert worker.counters["refused_malformed"] == 0


@pytest.mark.parametrize("codec", CODED)
def test_a_worker_refuses_bytes_that_do_not_fit(broker: str, checkpoint: Path, codec: Any) -> None:
    with joined(broker, checkpoint, codec=codec) as (model, worker):
        session = model._client.open_session()
        step = payloads.CodedStep("float32", 32, [payloads.Run(0, 0, [0])], codec=codec, size=7)
        with pytest.raises(Malformed, match="the worker refused"):
            session.call([(step, bytes(7))])
        session.close()
        model.generate(PROMPT, **GREEDY)
        assert worker.counters["refused_malformed"] == 1


@pytest.mark.parametrize(
    "reply",
    [
        payloads.Result("float32", 2, 32),
        payloads.CodedResult("float32", 2, 32, codec="int4", size=8),
        payloads.CodedResult("float32", 2, 32, codec="int8", size=8),
    ],
    ids=["exact", "int4", "size"],
)
def test_a_device_refuses_an_answer_that_is_encoded_otherwise(reply: payloads.Result) -> None:
    with pytest.raises(Malformed):
        Chunk([], torch.zeros(2, 32)).output(reply, memoryview(bytes(reply.tensor_bytes)), CODECS["int8"], False)
