"""Outputs travel back only where they are wanted: of a prompt the last one, if the device has no layers behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_replay import strike_at
from transformers import GenerationConfig, LlamaForCausalLM

import tiny
from fleet import joined, running_broker, start_worker
from split_common.errors import Malformed
from split_common.models.codecs import CODECS
from split_common.models.tensors import to_bytes
from split_common.protocol import payloads
from split_common.protocol.capabilities import CAPABILITIES, OUTPUTS
from split_common.protocol.channel import Channel
from split_common.protocol.handshake import DeviceHandshake, WorkerHandshake
from split_device import SplitModelForCausalLM
from split_device.generation import embedding
from split_device.generation.generator import Generator, Request
from split_device.sessions import channels
from split_device.sessions.chunks import Chunk, cut
from split_device.sessions.places import PlacedRun
from split_worker import worker as worker_module
from split_worker.bodies.language import LanguageBody
from wiretap import LATE

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [0]}
PROMPT = (torch.arange(150) * 7 % 90 + 3)[None]
#: Bytes of a token's state, in fp32.
STATE = 32 * 4
#: More than the numbers of one message take, and its padding.
NUMBERS = 200

WITHOUT = {"capabilities": CAPABILITIES - {OUTPUTS}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("wanted"))


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as broker:
        yield broker.address


@pytest.fixture(scope="module")
def unsplit() -> Any:
    return tiny.build("llama")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """For each step that a worker has computed, its tokens and those that it answers."""
    seen: list[tuple[int, int]] = []
    reply = LanguageBody.reply

    def noting(body: LanguageBody, state: Any, request: Any, output: torch.Tensor) -> Any:
        answer, data = reply(body, state, request, output)
        if isinstance(answer, payloads.Result):
            seen.append((request.tokens, answer.tokens))
            padded = isinstance(request, payloads.PaddedStep)
            assert answer.tensor_bytes < len(data) if padded else answer.tensor_bytes == len(data)
        return answer, data

    monkeypatch.setattr(LanguageBody, "reply", noting)
    return seen


def config_of(model: Any) -> GenerationConfig:
    return GenerationConfig(**GREEDY, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)


def generated(model: Any, prompt: torch.Tensor = PROMPT, **fields: Any) -> list[int]:
    with Generator(model, speculate="off") as generator:
        return generator.submit(Request(prompt[0].tolist(), config_of(model), **fields)).result(LATE)


def received(model: Any, call: Callable[[], Any]) -> int:
    before = model.traffic["bytes_received"]
    call()
    return int(model.traffic["bytes_received"] - before)


@pytest.mark.parametrize("codec", CODECS)
def test_of_a_prompt_one_output_travels_back(
    broker: str, checkpoint: Path, unsplit: Any, codec: str, answers: list[tuple[int, int]]
) -> None:
    wanted = unsplit.generate(PROMPT, **GREEDY)
    with joined(broker, checkpoint, 2, 0, codec=codec) as (model, _):
        for call in (lambda: model.generate(PROMPT, **GREEDY), lambda: generated(model)):
            del answers[:]
            assert received(model, call) < 8 * STATE + 8 * NUMBERS < 150 * STATE / 4
            assert answers == [(150, 1), (1, 1), (1, 1), (1, 1)]
        if codec in ("exact", "lossless"):
            assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
            assert generated(model) == wanted[0, 150:].tolist()


def test_of_the_parts_of_a_prompt_only_the_last_brings_an_output(
    broker: str, checkpoint: Path, unsplit: Any, answers: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART_TOKENS", 50)
    wanted = unsplit.generate(PROMPT, **GREEDY)[0, 150:].tolist()
    with joined(broker, checkpoint, 2, 0) as (model, _):
        assert generated(model) == wanted
        assert answers == [(50, 0), (50, 0), (50, 1), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("old", ["device", "worker"])
@pytest.mark.parametrize("parts", [False, True])
def test_all_outputs_travel_between_peers_of_which_one_is_older(
    broker: str,
    checkpoint: Path,
    unsplit: Any,
    old: str,
    parts: bool,
    answers: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if old == "device":
        monkeypatch.setattr(channels, "DeviceHandshake", functools.partial(DeviceHandshake, **WITHOUT))
    else:
        monkeypatch.setattr(worker_module, "WorkerHandshake", functools.partial(WorkerHandshake, **WITHOUT))
    if parts:
        monkeypatch.setattr(embedding, "PART_TOKENS", 50)
    wanted = unsplit.generate(PROMPT, **GREEDY)
    with joined(broker, checkpoint, 2, 0) as (model, _):
        assert received(model, lambda: model.generate(PROMPT, **GREEDY)) > 150 * STATE
        assert generated(model) == wanted[0, 150:].tolist()
        assert all(tokens == answered for tokens, answered in answers)
        assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)


def test_outputs_that_are_asked_for_travel(
    broker: str, checkpoint: Path, unsplit: Any, answers: list[tuple[int, int]]
) -> None:
    """All logits, hidden states, and log probabilities of a prompt; and whatever a tail with layers needs."""
    with joined(broker, checkpoint, 2, 0) as (model, _), torch.no_grad():
        assert torch.allclose(model(PROMPT).logits, unsplit(PROMPT).logits, atol=1e-4)
        kept = model(PROMPT, logits_to_keep=3).logits
        assert torch.allclose(kept, unsplit(PROMPT, logits_to_keep=3).logits, atol=1e-4)
        states = model(PROMPT, logits_to_keep=1, output_hidden_states=True).hidden_states[-1]
        wanted = unsplit(PROMPT, logits_to_keep=1, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(states, wanted, atol=1e-4)
        assert answers == [(150, 150), (150, 3), (150, 150)]
        with Generator(model, speculate="off") as generator:
            scored = generator.submit(Request(PROMPT[0].tolist(), config_of(model), prompt_logprobs=0))
            scored.result(LATE)
        logits = torch.log_softmax(unsplit(PROMPT).logits[0, :-1], -1)
        wanted = logits.gather(1, PROMPT[0, 1:, None])[:, 0]
        found = torch.tensor([each.chosen for each in scored.prompt_logprobs if each is not None])
        assert torch.allclose(found, wanted, atol=1e-3)
        assert answers[3] == (150, 150)
    with joined(broker, checkpoint, 2, 2) as (model, _):
        del answers[:]
        generated(model)
        model.generate(PROMPT, **GREEDY)
        assert answers[0] == answers[4] == (150, 150)


def test_models_that_ignore_logits_to_keep_get_all(
    broker: str, checkpoint: Path, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of `VideoLlama3ForConditionalGeneration`: its `forward` takes the argument, and gives all logits."""
    forward = LlamaForCausalLM.forward

    def ignoring(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return forward(self, input_ids, **kwargs | {"logits_to_keep": 0})

    monkeypatch.setattr(LlamaForCausalLM, "forward", ignoring)
    with joined(broker, checkpoint, 2, 0) as (model, _), torch.no_grad():
        logits = model(PROMPT[:, :9], logits_to_keep=1).logits
        assert torch.allclose(logits, unsplit(PROMPT[:, :9]).logits, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": tiny.LONGROPE}], ids=["plain", "longrope"])
def test_padded_rows_beams_and_assistants(
    changes: dict[str, Any], tmp_path: Path, answers: list[tuple[int, int]]
) -> None:
    unsplit = tiny.build("llama", **changes)
    padded = torch.tensor([[0, 0, 0, 21, 22, 23], [11, 12, 13, 14, 15, 16]])
    repeated = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7, 8]])
    calls: list[Callable[[Any], torch.Tensor]] = [
        lambda model: model.generate(padded, attention_mask=(padded != 0).long(), **GREEDY),
        lambda model: model.generate(PROMPT[:, :9], num_beams=3, num_return_sequences=2, **GREEDY),
        lambda model: model.generate(repeated, prompt_lookup_num_tokens=4, **GREEDY),
    ]
    with (
        running_broker() as broker,
        joined(broker.address, tiny.save("llama", tmp_path, **changes), 2, 0) as (model, _),
    ):
        for call in calls:
            assert torch.equal(call(model), call(unsplit))
    assert any(answered < tokens for tokens, answered in answers)


def test_a_replay_brings_nothing_back(
    broker: str, checkpoint: Path, unsplit: Any, answers: list[tuple[int, int]]
) -> None:
    """Its outputs were there before, whatever the tail."""
    wanted = unsplit.generate(PROMPT, **GREEDY)
    workers = [start_worker(checkpoint, broker) for _ in range(2)]
    try:
        with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker) as model:

            class Once:
                def strike(self) -> None:
                    holder = next(worker for worker in workers if len(worker._sessions))
                    holder.stop()

            strike_at(model, Once(), {2})  # type: ignore[arg-type]
            assert torch.equal(model.generate(PROMPT, **GREEDY), wanted)
            assert model.traffic["replays"] == 1
    finally:
        for worker in workers:
            worker.stop()
    assert answers == [(150, 150), (1, 1), (151, 0), (1, 1), (1, 1)]


# --- what a worker and a device refuse -----------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [[3], [1, 1], [1, 0], [2**40]])
def test_outputs_that_a_step_does_not_have_are_refused(broker: str, checkpoint: Path, outputs: list[int]) -> None:
    data, rows = to_bytes(torch.zeros(3, 32)), [payloads.Run(0, 0, [0, 1, 2])]
    step = payloads.BriefStep("float32", 32, rows, codec="exact", size=len(data), outputs=outputs)
    with joined(broker, checkpoint) as (model, worker):
        with pytest.raises(Malformed, match="asks for outputs that are not those of its tokens"):
            model._client.open_session().call([(step, data)])
        assert worker.counters["forwards"] == 0


def test_what_was_not_agreed_on_is_refused(broker: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "WorkerHandshake", functools.partial(WorkerHandshake, **WITHOUT))
    monkeypatch.setattr(Channel, "require", lambda *_: None)
    monkeypatch.setattr("split_device.sessions.session.RemoteSession.brief", True)
    with joined(broker, checkpoint, 2, 0) as (model, worker):
        with pytest.raises(Malformed, match="the channel has no outputs"):
            model.generate(PROMPT, **GREEDY)
        assert worker.counters["forwards"] == 0


@pytest.mark.parametrize(("tokens", "brief"), [(3, True), (1, False), (0, True)])
def test_a_reply_with_other_outputs_than_those_that_were_asked_for(tokens: int, brief: bool) -> None:
    chunk = Chunk([], torch.zeros(3, 4), torch.tensor([False, False, True]))
    reply = payloads.Result("float32", tokens, 4)
    with pytest.raises(Malformed, match="returned no states of the shape"):
        chunk.output(reply, memoryview(bytes(reply.tensor_bytes)), CODECS["exact"], brief)


def test_chunks_know_which_of_their_outputs_are_wanted() -> None:
    """Also of runs that get a token more, so that the worker sees the largest position of the call."""
    runs = [PlacedRun(0, 0, torch.arange(3)), PlacedRun(1, 0, torch.arange(2))]
    wanted = torch.tensor([False, False, True, False, True])
    states = torch.arange(5.0)[:, None]
    assert [chunk.wanted.tolist() for chunk in cut(runs, states, 2, wanted=wanted)] == [  # type: ignore[union-attr]
        [False, False],
        [True, False],
        [True],
    ]
    (chunk,) = cut(runs, states, 9, horizon=2, wanted=wanted)
    assert chunk.wanted is not None
    assert chunk.wanted.tolist() == [False, False, True, False, True, False]
    assert chunk.step(None, CODECS["exact"], 24, brief=True).outputs == [2, 4]  # type: ignore[attr-defined]
    full = payloads.Result("float32", 6, 1)
    output = chunk.output(full, to_bytes(torch.arange(6.0)[:, None]), CODECS["exact"], brief=False)
    assert output.flatten().tolist() == [2.0, 4.0]
