"""Drafts of a checkpoint's own MTP layers: they change no token, and are those of transformers' own MTP model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    GenerationConfig,
)
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import mtp_checkpoints
import tiny
from fleet import joined, replaced, running_broker, split_model
from split_common.engine.sequences import KVSequence
from split_common.errors import ConfigError, MissingTensor, SplitError, UnsupportedFeature
from split_device.cli.doctor_draft import draft_findings
from split_device.generation import mtp
from split_device.generation.generator import Generation, Generator, Request
from split_device.generation.mtp import MtpDrafts, MtpSequence
from split_device.speculation.names import check_speculate
from split_device.speculation.speculation import Speculation
from wiretap import LATE

pytestmark = pytest.mark.usefixtures("patient_queue")

#: Their tensors lie behind the last layer, or apart.
ARCHITECTURES = ("deepseek_v3", pytest.param("mellum", marks=pytest.mark.long))

TOKENS = 20


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts as many tokens as may be, whatever they cost."""
    monkeypatch.setattr(Speculation, "_choose", lambda _self, _begun, limit, *_: (max(0, limit), False))


def greedy(tokens: int = TOKENS, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, **options)


def requests() -> list[Request]:
    return [
        Request([5, 17, 33, 9], greedy()),
        Request([*range(3, 80)], greedy()),
        Request([6], greedy(repetition_penalty=1.3)),
        Request([8, 9, 10], GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=TOKENS), seed=5),
        Request([13], greedy(1)),
    ]


def results(generations: list[Generation]) -> list[list[int]]:
    return [each.result(LATE) for each in generations]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tail", [2, 0])
def test_drafts_are_those_of_transformers(
    arch: str, tail: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = mtp_checkpoints.save(arch, tmp_path / arch)
    drafts: list[tuple[list[int], int]] = []
    foresee = MtpDrafts.foresee

    def recording(self: MtpDrafts, asked: Any) -> None:
        foresee(self, asked)
        drafts.extend(
            (list(each.predictor.text), each.predictor.spine[0]) for each, _ in asked if each.predictor.spine
        )

    monkeypatch.setattr(MtpDrafts, "foresee", recording)
    with split_model(directory, 2, tail) as model:
        with Generator(model, speculate="off") as generator:
            plain = results([generator.submit(each) for each in requests()])
        with Generator(model, speculate="mtp") as generator:
            assert results([generator.submit(each) for each in requests()]) == plain
            assert generator.counters["drafted_tokens"] > TOKENS
            assert generator._drafting._model is not None
            assert generator._drafting._model.held_tokens == 0
    unsplit = AutoModelForCausalLM.from_pretrained(directory)
    prompt = torch.tensor([requests()[0].prompt])
    assert unsplit.generate(prompt, generation_config=greedy())[0, 4:].tolist() == plain[0]
    # What its class names are the numbers of real ones.
    unsplit._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{tiny.LAYERS}\.", r"^mtp\."]
    reference = MtpModel.from_pretrained(unsplit)
    assert len(drafts) > 2 * TOKENS
    for text, drafted in drafts:
        assert drafted == reference_draft(unsplit, reference, text)


@torch.no_grad()
def reference_draft(model: Any, reference: MtpModel, text: list[int]) -> int:
    """The token that transformers' MTP model drafts after a text."""
    tokens = torch.tensor([text])
    states = model.model(tokens[:, :-1]).last_hidden_state
    positions = torch.arange(1, len(text))[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    drafted, _, _ = reference(tokens[:, 1:], states, None, positions, cache)
    return int(drafted[0, 0])


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that its MTP layer predicts."""
    return mtp_checkpoints.save("deepseek_v3", tmp_path_factory.mktemp("mtp") / "model", mtp_checkpoints.predicts)


@pytest.fixture(scope="module")
def split(predicting: Path) -> Iterator[Any]:
    with split_model(predicting) as model:
        yield model


def test_drafts_of_a_layer_that_predicts_are_accepted(split: Any) -> None:
    with Generator(split, speculate="off") as generator:
        plain = results([generator.submit(each) for each in requests()])
    with Generator(split, speculate="mtp") as generator:
        # The second time, the prompts' states are cached.
        for _ in range(2):
            generations = [generator.submit(each) for each in requests()]
            assert results(generations) == plain
            assert generations[0].accepted_tokens == generations[0].drafted_tokens > 0
            assert generations[0].speculate == "mtp"
        counters = generator.counters
        assert counters["steps"] < counters["tokens"] / 2


@pytest.mark.parametrize("part", ["computed", "chosen"])
def test_states_that_cannot_be_kept_end_drafts_and_no_request(
    split: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MtpSequence, part, lambda *_: 1 // 0)
    with Generator(split, speculate="mtp") as generator, Generator(split, speculate="off") as other:
        generation = generator.submit(requests()[0])
        assert generation.result(LATE) == other.submit(requests()[0]).result(LATE)
    assert (generation.speculate, generation.drafted_tokens) == ("off", 0)


def test_a_long_prompt_is_read_while_steps_are_away(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = MtpDrafts.read
    monkeypatch.setattr(MtpDrafts, "read", lambda self: reads.append(1) or read(self))
    with Generator(split, speculate="mtp") as generator:
        generation = generator.submit(requests()[1])
        generation.result(LATE)
    assert reads
    assert generation.accepted_tokens > 0


def test_what_the_sequence_of_a_request_reads() -> None:
    cut: list[int] = []
    sequence = MtpSequence(cast("KVSequence", SimpleNamespace(truncate=cut.append)), 0, 100)
    text, width = list(range(10, 15)), 2
    states = torch.arange(20.0)[:, None].expand(20, width)
    # A prompt whose first tokens were cached, and its first token.
    sequence.computed(states[2:4])
    sequence.computed(states[4:5])
    sequence.predictor.extend([*text, 20])
    sequence.chosen(0, 1)
    assert sequence.unread() == [13, 14, 20]
    assert torch.equal(sequence.states(3), states[2:5])
    sequence.holds([13, 14, 20], torch.ones(3, width))
    assert (sequence.unread(), sequence.states(1), sequence.held) == ([], None, 3)
    # Two tokens are drafted, of which the first one is right; the model chose another one, which forced two more.
    assert list(sequence.positions([21])) == [3]
    sequence.holds([21], torch.zeros(1, width))
    sequence.computed(states[5:8])
    sequence.predictor.extend([21, 30, 31, 32])
    sequence.chosen(1, 3)
    assert sequence.unread() == [21, 30]
    assert cut == [3]
    assert torch.equal(sequence.states(2), states[5:7])
    assert not sequence.can_begin(3)
    # The forced ones go through together.
    sequence.computed(states[7:10])
    sequence.predictor.extend([33])
    sequence.chosen(0, 1)
    assert sequence.unread() == [21, 30, 31, 32, 33]
    assert torch.equal(sequence.states(9), states[[5, 6, 7, 8, 9]])


def test_what_was_not_read_for_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp, "MOST_STATES", 3)
    cut: list[int] = []
    sequence = MtpSequence(cast("KVSequence", SimpleNamespace(truncate=cut.append)), 0, 100)
    for token in range(6):
        sequence.computed(torch.full((1, 2), float(token)))
        sequence.predictor.extend([token, 9] if token == 0 else [token])
        sequence.chosen(0, 1)
    assert len(sequence.unread()) == 3
    assert sequence.states(9)[:, 0].tolist() == [3, 4, 5]
    assert (set(cut), sequence.held) == ({0}, 0)


def test_what_waits_takes_no_more_memory_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp, "MOST_STATES", 4)
    sequence = MtpSequence(cast("KVSequence", SimpleNamespace(truncate=lambda _: None)), 0, 100)
    # The parts of a prompt, all of which come before the first token.
    for part in range(6):
        sequence.computed(torch.full((2, 1), float(part)))
        assert sum(map(len, sequence._computed)) <= 4
    sequence.predictor.extend(range(13))
    with monkeypatch.context() as patched:
        # What is not read for long is not copied with every token.
        patched.setattr(torch, "cat", lambda *_: 1 // 0)
        sequence.chosen(0, 1)
        for token in range(3):
            # Steps whose drafts are wrong.
            sequence.computed(torch.full((4, 1), 9.0 + token))
            sequence.predictor.extend([50 + token])
            sequence.chosen(3, 1)
    assert sequence.unread() == [12, 50, 51, 52]
    assert sequence.states(4)[:, 0].tolist() == [5, 9, 10, 11]
    assert sequence.states(2)[:, 0].tolist() == [5, 9]
    held = sum(piece.untyped_storage().nbytes() for piece in sequence._pieces)
    assert held <= (4 + 1) * 4


def test_what_has_no_such_layers_is_refused_by_name(split: Any, tmp_path: Path) -> None:
    def refused(error: type[SplitError], match: str, directory: Path) -> None:
        with split_model(directory) as model, pytest.raises(error, match=match):
            Generator(model, speculate="mtp")

    refused(UnsupportedFeature, "bare has no tensors of MTP layers", tiny.save("deepseek_v3", tmp_path / "bare"))
    llama = tiny.save("llama", tmp_path / "llama")
    refused(UnsupportedFeature, r"transformers knows of no MTP layers of its type \(llama\)", llama)
    hybrid = tiny.save("qwen3_5_text", tmp_path / "hybrid")
    refused(UnsupportedFeature, "its layers keep states, which cannot take tokens back", hybrid)

    def without(tensor: str) -> Path:
        def remove(tensors: dict[str, torch.Tensor]) -> None:
            del tensors[tensor]

        return mtp_checkpoints.save("deepseek_v3", tmp_path / tensor, remove)

    refused(MissingTensor, "lacks the tensor hnorm.weight of an MTP layer", without("mtp.hnorm.weight"))
    lacking = without("mtp.block.input_layernorm.weight")
    refused(MissingTensor, "input_layernorm.weight of an MTP layer", lacking)
    with Generator(split) as generator, pytest.raises(ConfigError, match="loads such weights when it starts"):
        generator.submit(Request([5], greedy(1), speculate="mtp"))
    with pytest.raises(ConfigError, match="an assistant attends to the keys and values"):
        check_speculate("assistant:google/gemma-4-E2B-it-assistant")


@pytest.mark.long
def test_a_worker_that_goes_away(predicting: Path) -> None:
    with running_broker() as broker, joined(broker.address, predicting) as (model, worker):
        with Generator(model, speculate="off") as generator:
            plain = results([generator.submit(each) for each in requests()])
        with (
            Generator(model, speculate="mtp") as generator,
            replaced(
                worker, predicting, broker.address, lambda: generator.counters["accepted_tokens"] > 5
            ) as strike,
        ):
            assert results([generator.submit(each, strike) for each in requests()]) == plain
            assert model.traffic["replays"] > 0


def test_generate_runs_them_as_transformers_does(predicting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.tensor([[5, 17, 33, 9]])
    with split_model(predicting, 2, 1) as model:
        pattern = [rf"model\.layers\.{tiny.LAYERS}\."]
        monkeypatch.setattr(model, "_keys_to_ignore_on_load_unexpected", pattern)
        plain = model.generate(prompt, generation_config=greedy())
        steps = model.timings.steps
        assert torch.equal(model.generate(prompt, generation_config=greedy(), use_mtp=True), plain)
        assert model.timings.steps - steps < TOKENS
        monkeypatch.setattr(model, "revision", "other")
        with pytest.raises(UnsupportedFeature, match="not of revision 'other'"):
            model.generate(prompt, use_mtp=True)
    with (
        split_model(predicting, 2, 0) as model,
        pytest.raises(UnsupportedFeature, match="tail_layers of at least 1"),
    ):
        model.generate(prompt, use_mtp=True)


def test_doctor_tries_them(predicting: Path, tmp_path: Path) -> None:
    (found,) = draft_findings("mtp", str(predicting))
    assert (found.subject, found.status) == ("MTP layers", "ok")
    (found,) = draft_findings("mtp", str(tiny.save("llama", tmp_path / "llama")))
    assert (found.status, "knows of no MTP layers" in found.detail) == ("problem", True)


def test_an_assistant_reads_keys_and_values_of_the_tail(tmp_path: Path) -> None:
    changes = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    directory = tiny.save("gemma4_text", tmp_path / "gemma", **changes)
    unsplit = AutoModelForCausalLM.from_pretrained(directory)
    kinds = ["sliding_attention", "full_attention"]
    text = unsplit.config.to_dict() | {"num_hidden_layers": 2, "num_kv_shared_layers": 2, "layer_types": kinds}
    text |= {"head_dim": 8, "global_head_dim": 8, "enable_moe_block": False, "use_double_wide_mlp": False}
    text.pop("per_layer_config", None)
    assistant = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(text_config=text, backbone_hidden_size=32)).eval()
    assistant.generation_config.num_assistant_tokens = 3
    prompt = torch.tensor([[5, 17, 33, 9]])
    plain = unsplit.generate(prompt, generation_config=greedy())
    with split_model(directory) as model:
        assert torch.equal(model.generate(prompt, generation_config=greedy(), assistant_model=assistant), plain)
    with (
        split_model(directory, 2, 1) as model,
        pytest.raises(UnsupportedFeature, match="tail_layers of at least 2"),
    ):
        model.generate(prompt, assistant_model=assistant)
