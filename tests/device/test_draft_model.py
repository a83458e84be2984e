"""Drafts of a small model on the device: they change no token, and what they need is bounded and given back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tiny
from fleet import joined, replaced, running_broker, serving_here, split_model
from split_common.engine.runner import Runner
from split_common.errors import ConfigError, SplitError, UnsupportedFeature
from split_device.cli.doctor_draft import asked_draft_model, draft_findings
from split_device.generation.draft_layers import check_tokens
from split_device.generation.draft_model import DraftModel
from split_device.generation.generator import Generation, Generator, Request
from split_device.generation.loaded_drafts import DraftSequence
from split_device.speculation.speculation import Speculation
from split_device.speculation.spine import SpineDrafter, SpinePredictor
from wiretap import LATE

pytestmark = pytest.mark.usefixtures("patient_queue")

TOKENS = 24


@pytest.fixture(scope="module")
def drafting(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model itself, with its first layers and other weights: right now and then."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * weight.std() * torch.randn_like(weight)
    directory = tmp_path_factory.mktemp("draft") / "small"
    model.save_pretrained(directory)
    return tiny.save_tokenizer(directory)


@pytest.fixture(scope="module")
def drafted(split: Any, drafting: Path) -> Iterator[Generator]:
    with Generator(split, speculate=f"draft:{drafting}") as generator:
        yield generator


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts as many tokens as may be, whatever they cost."""
    monkeypatch.setattr(Speculation, "_choose", lambda _self, _begun, limit, *_: (max(0, limit), False))


def greedy(tokens: int = TOKENS, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, **options)


def sampling(tokens: int = TOKENS, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, max_new_tokens=tokens, **options)


def requests() -> list[Request]:
    """Greedy and sampled ones; each prompt is another one, and one is longer than what a draft begins with."""
    return [
        Request([5, 17, 33, 9], greedy()),
        Request([*range(3, 90)], greedy()),
        Request([6, 7], greedy(repetition_penalty=1.3)),
        Request([8, 9, 10], sampling(temperature=0.4), seed=5),
        Request([11, 12], sampling(temperature=0.8, top_k=9), seed=6),
        Request([13], greedy(1)),
    ]


def results(generations: list[Generation]) -> list[list[int]]:
    return [each.result(LATE) for each in generations]


@pytest.fixture(scope="module")
def plain(split: Any) -> list[list[int]]:
    with Generator(split, speculate="off") as generator:
        return results([generator.submit(each) for each in requests()])


@pytest.mark.usefixtures("eager")
def test_no_draft_changes_a_token(
    drafted: Generator, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    run = DraftModel._forward

    def counting(self: DraftModel, parts: Any, logits: bool = True) -> Any:
        rows.append(len(parts))
        return run(self, parts, logits)

    monkeypatch.setattr(DraftModel, "_forward", counting)
    assert results([drafted.submit(each) for each in requests()]) == plain
    assert max(rows) > 1, "requests do not share forwards"
    counters = drafted.counters
    assert 0 < counters["accepted_tokens"] < counters["drafted_tokens"]
    assert counters["steps"] < counters["tokens"]


@pytest.mark.usefixtures("eager")
def test_a_model_drafts_its_own_text(split: Any, checkpoint: Path, plain: list[list[int]]) -> None:
    with Generator(split, speculate=f"draft:{checkpoint}") as generator:
        generation = generator.submit(requests()[0])
        assert generation.result(LATE) == plain[0]
    assert generation.accepted_tokens == generation.drafted_tokens > 0
    # A chance of 5 % ends a draft, and this model is seldom sure.


def test_a_pace_of_its_own_changes_no_token(drafted: Generator, plain: list[list[int]]) -> None:
    assert results([drafted.submit(each) for each in requests()]) == plain


@pytest.mark.long
@pytest.mark.usefixtures("eager")
def test_memory_is_given_back_when_a_request_ends(split: Any, drafting: Path, plain: list[list[int]]) -> None:
    name = f"draft:{drafting}"
    # Of a page of 16 tokens, 6 layers keep 2 * 16 * 2 * 8 floats each.
    with Generator(split, speculate=name, kv_memory=6 * 2 * 16 * 2 * 8 * 4 * 12) as generator:
        for _ in range(8):
            generation = generator.submit(requests()[1])
            assert generation.result(LATE) == plain[1]
            assert (generation.speculate, generation.drafted_tokens > 0) == (name, True)


@pytest.mark.long
@pytest.mark.usefixtures("eager")
def test_without_memory_a_request_goes_on_without_drafts(split: Any, drafting: Path) -> None:
    with Generator(split, speculate="off") as generator:
        wanted = results([generator.submit(Request([index, 4, 5], greedy(40))) for index in range(12)])
    with Generator(split, speculate=f"draft:{drafting}", kv_memory=6 * 2 * 16 * 2 * 8 * 4 * 12) as generator:
        generations = [generator.submit(Request([index, 4, 5], greedy(40))) for index in range(12)]
        assert results(generations) == wanted
    drafters = {each.speculate for each in generations}
    assert drafters == {"off", f"draft:{drafting}"}


@pytest.mark.usefixtures("eager")
def test_cancelled_requests_disturb_no_other(drafted: Generator, plain: list[list[int]]) -> None:
    generations: list[Generation] = []

    def cancel(index: int) -> Any:
        return lambda *_: [each.cancel() for each in generations[index : index + 1] if len(each.tokens) > 5]

    for index, request in enumerate(requests()[:5]):
        generations.append(drafted.submit(request, cancel(index) if index % 2 else None))
    for index, (generation, text) in enumerate(zip(generations, plain, strict=False)):
        tokens = generation.result(LATE)
        assert tokens == text[: len(tokens)]
        assert generation.finish_reason == ("cancelled" if index % 2 else "length")
    assert results([drafted.submit(each) for each in requests()]) == plain
    model = drafted._drafting._model
    assert model is not None
    assert model.held_tokens == 0


@pytest.mark.usefixtures("eager")
def test_a_draft_model_that_fails_ends_drafts_and_no_request(
    split: Any,
    drafting: Path,
    plain: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Generator(split, speculate=f"draft:{drafting}") as generator:
        own = generator._drafting._model
        assert own is not None
        run = Runner.run
        monkeypatch.setattr(Runner, "run", lambda self, runs: 1 / 0 if self is own._runner else run(self, runs))
        assert results([generator.submit(each) for each in requests()]) == plain
        assert generator.counters["drafted_tokens"] == 0
    assert "the draft model failed" in caplog.text


@pytest.mark.usefixtures("eager")
def test_a_text_that_cannot_be_read_ends_drafts_and_no_request(
    drafted: Generator, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unread = DraftSequence.unread
    with monkeypatch.context() as broken:
        broken.setattr(
            DraftSequence, "unread", lambda self: 1 / 0 if len(self.predictor.text) > 9 else unread(self)
        )
        generations = [drafted.submit(each) for each in requests()]
        assert results(generations) == plain
        assert {each.speculate for each in generations[:-1]} == {"off"}
    generation = drafted.submit(requests()[0])
    assert generation.result(LATE) == plain[0]
    assert (generation.speculate[:6], generation.drafted_tokens > 0) == ("draft:", True)


@pytest.mark.usefixtures("eager")
def test_a_token_that_the_draft_model_lacks_ends_drafts_by_name(
    split: Any, tmp_path: Path, plain: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    fewer = tiny.save_tokenizer(tiny.save("llama", tmp_path / "fewer", vocab_size=80))
    with Generator(split, speculate=f"draft:{fewer}") as generator:
        strange = generator.submit(requests()[1])
        assert strange.result(LATE) == plain[1]
    assert (strange.speculate, strange.drafted_tokens) == ("off", 0)
    assert "drafts no more for a request" in caplog.text


def test_the_tokenizer_that_is_used_is_compared(split: Any, drafting: Path, tmp_path: Path) -> None:
    other = tiny.save_tokenizer(tiny.save("llama", tmp_path / "other"), "xyz")
    used = AutoTokenizer.from_pretrained(other)
    with pytest.raises(ConfigError, match="a draft model needs the same tokenizer"):
        Generator(split, speculate=f"draft:{drafting}", tokenizer=used)
    Generator(split, speculate=f"draft:{other}", tokenizer=used).close()


@pytest.mark.usefixtures("eager")
def test_a_prompt_that_is_cached_is_drafted_for_as_well(drafted: Generator, plain: list[list[int]]) -> None:
    for _ in range(2):
        generation = drafted.submit(requests()[1])
        assert generation.result(LATE) == plain[1]
        assert generation.drafted_tokens > 0
    assert generation.cached_tokens > 0


@pytest.mark.usefixtures("eager")
def test_requests_that_wait_for_a_prefix_are_drafted_for(drafted: Generator, split: Any) -> None:
    prompt = [*range(40, 95)]
    with Generator(split, speculate="off") as generator:
        wanted = generator.submit(Request(prompt, greedy())).result(LATE)
    generations = [drafted.submit(Request(prompt, greedy())) for _ in range(3)]
    assert results(generations) == [wanted] * 3
    assert all(each.drafted_tokens for each in generations)


@pytest.mark.usefixtures("eager")
def test_a_request_may_ask_for_other_drafts(drafted: Generator, plain: list[list[int]]) -> None:
    none, ngram = (drafted.submit(Request([5, 17, 33, 9], greedy(), speculate=name)) for name in ("off", "ngram"))
    assert none.result(LATE) == ngram.result(LATE) == plain[0]
    assert (none.drafted_tokens, ngram.drafted_tokens > 0) == (0, True)


@pytest.mark.long
@pytest.mark.usefixtures("eager")
def test_a_worker_that_goes_away(checkpoint: Path, drafting: Path, plain: list[list[int]]) -> None:
    with (
        running_broker() as broker,
        joined(broker.address, checkpoint) as (model, worker),
        Generator(model, speculate=f"draft:{drafting}") as generator,
        replaced(worker, checkpoint, broker.address, lambda: generator.counters["accepted_tokens"] > 5) as strike,
    ):
        generations = [generator.submit(each, strike) for each in requests()]
        assert results(generations) == plain
        assert model.traffic["replays"] > 0


def test_what_cannot_draft_is_refused_by_name(split: Any, checkpoint: Path, drafting: Path, tmp_path: Path) -> None:
    def refused(error: type[SplitError], match: str, name: Path | str) -> None:
        with pytest.raises(error, match=match):
            Generator(split, speculate=f"draft:{name}")

    refused(ConfigError, "there is no tokenizer of", tiny.save("llama", tmp_path / "bare"))
    strange = tiny.save_tokenizer(tiny.save("llama", tmp_path / "strange"), "xyz")
    refused(ConfigError, "a draft model needs the same tokenizer", strange)
    hybrid = tiny.save_tokenizer(tiny.save("qwen3_5_text", tmp_path / "hybrid"))
    refused(UnsupportedFeature, "its layers keep states", hybrid)
    longrope = tiny.save("llama", tmp_path / "longrope", rope_parameters=tiny.LONGROPE)
    refused(UnsupportedFeature, "depends on how the prompt is chunked", tiny.save_tokenizer(longrope))
    refused(SplitError, "nowhere", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="invalid speculate 'draft:'"):
        Generator(split, speculate="draft:")
    with Generator(split) as generator, pytest.raises(ConfigError, match="was not loaded"):
        generator.submit(Request([5], greedy(1), speculate=f"draft:{drafting}"))
    with split_model(longrope) as model, pytest.raises(UnsupportedFeature, match="cannot be done with this model"):
        Generator(model, speculate=f"draft:{checkpoint}")


def test_what_a_draft_model_expects() -> None:
    predictor = SpinePredictor()
    drafter = SpineDrafter(predictor)
    drafter.extend([1, 2])
    assert (drafter.draft(5), drafter.draft_tree(5).tokens) == ([], [])
    assert predictor.expect({7: 0.01, 8: 0.005}) == 0.01
    predictor.shorten()
    assert drafter.draft(5) == [7], "a pace would never learn that the model is unsure"
    predictor.forget()
    for chances in ({7: 0.6, 8: 0.3}, {9: 0.5, 3: 0.1}, {4: 0.01}):
        predictor.expect(chances)
    predictor.shorten()
    assert (drafter.draft(5), drafter.draft(1)) == ([7, 9], [7])
    tree = drafter.draft_tree(3)
    assert (tree.tokens, tree.parents) == ([7, 8, 9], [-1, -1, 0])
    drafter.extend([8])
    assert drafter.draft(5) == []


def test_tokens_that_were_added_may_differ(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # In one of the two it is a token like others, in the other one it was added.
    known = next(token for token in tokenizer.get_vocab() if token not in tokenizer.get_added_vocab())
    tokenizer.add_tokens([AddedToken(known, special=True), "<new>"])
    assert known in tokenizer.get_added_vocab()
    tokenizer.save_pretrained(tmp_path / "more")
    (tmp_path / "more" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    check_tokens(str(tmp_path / "more"), str(checkpoint))
    check_tokens(str(checkpoint), str(tmp_path / "more"))


def test_doctor_tries_a_draft_model(checkpoint: Path, drafting: Path, tmp_path: Path) -> None:
    (found,) = draft_findings(f"draft:{drafting}", str(checkpoint))
    assert (found.subject, found.status) == ("draft model", "ok")
    (found,) = draft_findings(f"draft:{tiny.save('llama', tmp_path / 'bare')}", str(checkpoint))
    assert (found.status, "no tokenizer" in found.detail) == ("problem", True)
    hybrid = tiny.save_tokenizer(tiny.save("qwen3_5_text", tmp_path / "hybrid"))
    (found,) = draft_findings(f"draft:{checkpoint}", str(hybrid))
    assert (found.status, "takes no drafts: its layers keep states" in found.detail) == ("problem", True)
    with pytest.raises(ConfigError, match="--speculate ngram needs no check"):
        asked_draft_model("ngram", str(checkpoint))
    with pytest.raises(ConfigError, match="give --model as well"):
        asked_draft_model(f"draft:{drafting}", None)


@pytest.mark.long
def test_commands_take_a_draft_model(run: Any, checkpoint: Path, drafting: Path) -> None:
    with serving_here(checkpoint) as broker:
        here = ("--model", checkpoint, "--broker", broker, "--max-tokens", TOKENS, "--seed", 3)
        answers = {
            run("generate", "Hello", *here, "--speculate", name).out for name in ("off", f"draft:{drafting}")
        }
        assert len(answers) == 1
        refused = run("generate", "Hello", *here, "--speculate", "draft:/nowhere/at/all")
        assert refused.code != 0
        assert "/nowhere/at/all" in refused.err
