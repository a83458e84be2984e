"""The split model against the unsplit one: the same tokens, whatever `generate` is asked to do."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import tiny
from fleet import TRANSPORTS_AT_NIGHT, joined, running_broker, using
from split_common.errors import UnsupportedFeature
from split_common.protocol import payloads
from split_device.sessions import chunks
from wiretap import record_requests

Model = Any

#: Long enough to leave every sliding window (8 tokens) and to take several chunks where chunks are made small.
PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29, 44, 3]])
REPETITIVE = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
BATCH = torch.tensor(
    [
        [0, 0, 0, 0, 61, 12, 80, 7, 29, 44, 3, 9],
        [0, 25, 17, 90, 33, 4, 71, 12, 8, 7, 54, 11],
        [31, 2, 66, 48, 13, 77, 19, 5, 40, 22, 85, 6],
    ]
)
MASK = (BATCH != 0).long()
#: The padding token is never generated: in a later turn it would be taken for padding.
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": [0]}


def greedy(model: Model) -> torch.Tensor:
    return model.generate(PROMPT, **GREEDY)


def padded_batch(model: Model) -> torch.Tensor:
    return model.generate(BATCH, attention_mask=MASK, **GREEDY)


def beams(model: Model) -> torch.Tensor:
    return model.generate(BATCH, attention_mask=MASK, num_beams=4, num_return_sequences=2, **GREEDY)


def sampling(model: Model) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(PROMPT, do_sample=True, temperature=1.3, num_return_sequences=3, max_new_tokens=12)


def prompt_lookup(model: Model) -> torch.Tensor:
    return model.generate(REPETITIVE, prompt_lookup_num_tokens=4, **GREEDY)


def assistant(model: Model) -> torch.Tensor:
    return model.generate(REPETITIVE, assistant_model=tiny.build("llama"), **GREEDY)


def no_cache(model: Model) -> torch.Tensor:
    return model.generate(BATCH, attention_mask=MASK, use_cache=False, **{**GREEDY, "max_new_tokens": 4})


def two_turns(model: Model) -> torch.Tensor:
    return _two_turns(model, DynamicCache())


def two_turns_configured(model: Model) -> torch.Tensor:
    return _two_turns(model, DynamicCache(config=model.config))


def _two_turns(model: Model, cache: DynamicCache) -> torch.Tensor:
    first = model.generate(PROMPT, past_key_values=cache, **GREEDY)
    return model.generate(torch.cat([first, torch.tensor([[7, 8, 9]])], 1), past_key_values=cache, **GREEDY)


def shared_prefix(model: Model) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    answers = []
    for question in ([7, 8], [9], []):
        prompt = torch.cat([PROMPT, torch.tensor([[*question, 21]])], 1)
        answers.append(model.generate(prompt, past_key_values=copy.deepcopy(cache), **GREEDY)[0])
    return torch.cat(answers)


#: Those whose steps have different shapes: one token, rows, copies of rows, several tokens, more tokens after
#: others.
SHAPES = [greedy, padded_batch, beams, prompt_lookup, two_turns]
#: Those that come to steps of such shapes in other ways.
WAYS = [sampling, assistant, no_cache, two_turns_configured, shared_prefix]

Case = tuple[str, tuple[int, int]]

#: Compared on other CPUs, too, for operations differ: rotations, bounded scores, means and biases, experts; sinks,
#: compressed keys, slopes, neighbours that turn together. The rest compute as these do.
ON_OTHER_CPUS = ("llama", "gemma2", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "bloom", "cohere2")
#: Unlisted architectures that differ most from listed ones: always run.
UNLIKE = (*ON_OTHER_CPUS, "opt", "falcon")
#: Every listed architecture at the default cut and with an empty head and tail; others where it is instructive.
DEFAULT: list[Case] = [(arch, (2, 2)) for arch in tiny.LISTED]
EMPTY_ENDS: list[Case] = [(arch, (0, 0)) for arch in tiny.LISTED if arch != "llama"]
#: Of these, embeddings that are scaled and ones of positions, windows in some layers, and experts.
LONGER = [(arch, (0, 0)) for arch in ("gemma2", "gpt2", "qwen2_sw", "mixtral")]
MORE_CUTS: list[Case] = [
    ("llama", (0, 0)),
    ("llama", (1, 3)),
    ("llama", (5, 0)),
    ("gemma2", (0, 5)),
    ("qwen2_sw", (4, 1)),
    ("qwen2_sw", (1, 3)),
]
CASES = [
    *(pytest.param(case, marks=[pytest.mark.numbers] * (case[0] in ON_OTHER_CPUS)) for case in DEFAULT),
    *(pytest.param(case, marks=pytest.mark.long if case in LONGER else pytest.mark.nightly) for case in EMPTY_ENDS),
    *MORE_CUTS,
]
#: Where `WAYS` are taken; elsewhere, at night.
FIRST: list[Case] = [
    ("llama", (2, 2)),
    ("gpt2", (2, 2)),
    ("llama", (0, 0)),
    ("gemma2", (0, 5)),
    ("qwen2_sw", (4, 1)),
]
LATER = [each for each in (*DEFAULT, *EMPTY_ENDS, *MORE_CUTS) if each not in FIRST]


def name_of(case: Case) -> str:
    arch, (head, tail) = case
    return f"{arch}-{head}-{tail}"


@pytest.fixture(scope="module", params=TRANSPORTS_AT_NIGHT)
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def broker(transport: str) -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return tiny.saved_once(tmp_path_factory)


@pytest.fixture(scope="module")
def expected() -> Callable[[str, Callable[[Model], torch.Tensor]], torch.Tensor]:
    """What the unsplit model answers; computed once for all cuts."""
    models: dict[str, Model] = {}
    answers: dict[tuple[str, str], torch.Tensor] = {}

    def ask(arch: str, mode: Callable[[Model], torch.Tensor]) -> torch.Tensor:
        key = (arch, mode.__name__)
        if key not in answers:
            models.setdefault(arch, tiny.build(arch))
            answers[key] = mode(models[arch])
        return answers[key]

    return ask


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def case(
    request: pytest.FixtureRequest, broker: str, checkpoint: Callable[[str], Path]
) -> Iterator[tuple[str, Model]]:
    arch, (head, tail) = request.param
    with joined(broker, checkpoint(arch), head, tail) as (model, _):
        yield arch, model


@pytest.fixture(scope="module")
def llama(broker: str, checkpoint: Callable[[str], Path]) -> Iterator[tuple[Model, Model]]:
    """The unsplit model, and the split one."""
    with joined(broker, checkpoint("llama")) as (model, _):
        yield tiny.build("llama"), model


@pytest.mark.parametrize("mode", SHAPES, ids=lambda mode: mode.__name__)
def test_same_tokens(case: tuple[str, Model], mode: Callable[[Model], torch.Tensor], expected: Any) -> None:
    arch, model = case
    assert mode(model).tolist() == expected(arch, mode).tolist()


@pytest.mark.parametrize("mode", WAYS, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(
    "case", [*FIRST, *(pytest.param(case, marks=pytest.mark.nightly) for case in LATER)], ids=name_of, indirect=True
)
def test_same_tokens_in_other_ways(
    case: tuple[str, Model], mode: Callable[[Model], torch.Tensor], expected: Any
) -> None:
    arch, model = case
    assert mode(model).tolist() == expected(arch, mode).tolist()


@pytest.mark.parametrize(
    "arch",
    [
        *(pytest.param(arch, marks=pytest.mark.numbers) for arch in tiny.UNLISTED if arch in ON_OTHER_CPUS),
        *("opt", "falcon", *tiny.ODD),
        *(pytest.param(arch, marks=pytest.mark.long) for arch in tiny.UNLISTED if arch not in UNLIKE),
    ],
)
def test_unlisted_architecture(arch: str, broker: str, checkpoint: Callable[[str], Path], expected: Any) -> None:
    with joined(broker, checkpoint(arch)) as (model, _):
        for mode in SHAPES:
            assert mode(model).tolist() == expected(arch, mode).tolist(), mode.__name__


@pytest.mark.numbers
@pytest.mark.parametrize("arch", tiny.UNPADDED)
def test_rows_that_padding_changes_are_refused(
    arch: str, broker: str, checkpoint: Callable[[str], Path], expected: Any
) -> None:
    with joined(broker, checkpoint(arch)) as (model, worker):
        assert any("padding" in line for line in worker._body.describe("2:4"))
        for mode in (greedy, prompt_lookup, two_turns):
            assert mode(model).tolist() == expected(arch, mode).tolist(), mode.__name__
        steps = worker.counters["steps"]
        with pytest.raises(UnsupportedFeature, match="padding does not run split with this model"):
            padded_batch(model)
        assert worker.counters["steps"] == steps


def test_logits_are_close(case: tuple[str, Model]) -> None:
    arch, model = case
    full = tiny.build(arch)
    with torch.no_grad():
        theirs = full(BATCH, attention_mask=MASK).logits
        ours = model(BATCH, attention_mask=MASK).logits
    assert torch.allclose(ours[MASK == 1], theirs[MASK == 1], atol=1e-4, rtol=1e-4)


# --- what else generate does, on one architecture ----------------------------------------------------------


class Collector(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class Favour(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, int(input_ids[0, -1] + 1) % tiny.VOCABULARY] += 3
        return scores


class AtLength(StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 15)


def test_streamer_processor_and_criteria(llama: tuple[Model, Model]) -> None:
    full, split = llama
    options = {
        **GREEDY,
        "logits_processor": LogitsProcessorList([Favour()]),
        "stopping_criteria": StoppingCriteriaList([AtLength()]),
    }
    collector = Collector()
    answer = split.generate(PROMPT, streamer=collector, **options)
    assert answer.tolist() == full.generate(PROMPT, **options).tolist()
    assert answer.shape[1] == 15
    assert collector.tokens == answer[0].tolist()
    assert collector.ended


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"cache_implementation": "dynamic"},
        {"eos_token_id": [12, 44, 80]},
        {"num_beams": 3, "num_beam_groups": 1, "length_penalty": 0.3, "early_stopping": True, "eos_token_id": 12},
        {"guidance_scale": 1.5, "negative_prompt_ids": PROMPT[:, :3]},
        {"prefix_allowed_tokens_fn": lambda _, ids: [7, 8, 10 + int(ids[-1]) % 20], "num_beams": 3},
        {"custom_generate": lambda model, input_ids, **_: model.generate(input_ids, **GREEDY)},
        {"num_return_sequences": 3, "do_sample": True, "num_beams": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate_options(llama: tuple[Model, Model], options: dict[str, Any]) -> None:
    def generated(model: Model) -> Any:
        torch.manual_seed(5)
        return model.generate(PROMPT, **GREEDY | options)

    theirs, ours = map(generated, llama)
    if "output_scores" in options:
        assert torch.allclose(torch.stack(ours.scores), torch.stack(theirs.scores), atol=1e-4)
        theirs, ours = theirs.sequences, ours.sequences
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("more", [0, 3])
def test_chunks_of_a_prompt_that_are_padding(llama: tuple[Model, Model], more: int) -> None:
    """Of one row, or of all rows; equal rows travel once where they can."""
    batch, mask = (torch.nn.functional.pad(each, (more, 0)) for each in (BATCH, MASK))
    options = {**GREEDY, "attention_mask": mask, "prefill_chunk_size": 3, "num_beams": 2}
    theirs, ours = (model.generate(batch, **options).tolist() for model in llama)
    assert ours == theirs


def test_split_model_as_assistant(llama: tuple[Model, Model]) -> None:
    full, split = llama
    answer = full.generate(REPETITIVE, assistant_model=split, **GREEDY)
    assert answer.tolist() == full.generate(REPETITIVE, **GREEDY).tolist()


@pytest.mark.numbers
def test_inputs_embeds(llama: tuple[Model, Model]) -> None:
    embeddings = llama[0].get_input_embeddings()(PROMPT)
    theirs, ours = (model.generate(inputs_embeds=embeddings, **GREEDY) for model in llama)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.numbers
def test_right_padding_when_scoring(broker: str, checkpoint: Callable[[str], Path]) -> None:
    """Tokens after which padding follows are not touched by it, not even with sliding windows."""
    batch, mask = BATCH.flip(1), MASK.flip(1)
    with joined(broker, checkpoint("mistral")) as (model, _), torch.no_grad():
        ours = model(batch, attention_mask=mask).logits
        theirs = tiny.build("mistral")(batch, attention_mask=mask).logits
    assert torch.allclose(ours[mask == 1], theirs[mask == 1], atol=1e-4)


@pytest.mark.numbers
def test_padding_between_turns(llama: tuple[Model, Model]) -> None:
    """Rows of a batch end their first turn at different columns; the second turn follows after a gap."""

    def second_turn(model: Model) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        mask = torch.cat([MASK.flip(1), torch.ones(3, 4, dtype=torch.long)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            model(BATCH.flip(1), attention_mask=mask[:, :12], position_ids=positions[:, :12], past_key_values=cache)
            return model(
                BATCH[:, 8:], attention_mask=mask, position_ids=positions[:, 12:], past_key_values=cache
            ).logits

    full, split = llama
    assert torch.allclose(second_turn(split), second_turn(full), atol=1e-4)


def tokens_in(sent: list[Any]) -> int:
    """Tokens whose hidden states were sent."""
    return sum(request.tokens for request in sent if isinstance(request, payloads.Step))


def test_second_turn_does_not_send_the_first_again(
    llama: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, split = llama
    cache = DynamicCache()
    first = split.generate(PROMPT, past_key_values=cache, **GREEDY)
    sent = record_requests(monkeypatch)
    split.generate(
        torch.cat([first, torch.tensor([[7, 8]])], 1), past_key_values=cache, **{**GREEDY, "max_new_tokens": 1}
    )
    # Three tokens of hidden states: the last one generated has not been through the body yet.
    assert tokens_in(sent) == 3


def test_equal_rows_travel_once(llama: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    _, split = llama
    sent = record_requests(monkeypatch)
    split.generate(REPETITIVE.repeat(1, 8), do_sample=True, max_new_tokens=1, num_return_sequences=6)
    assert tokens_in(sent) == 8 * REPETITIVE.numel()


def test_equal_states_at_other_positions_are_not_equal_rows(broker: str, checkpoint: Callable[[str], Path]) -> None:
    rows = PROMPT.repeat(2, 1)
    positions = torch.stack([torch.arange(11), torch.arange(11) * 3])
    options = {"attention_mask": torch.ones_like(rows), "position_ids": positions}
    with joined(broker, checkpoint("llama"), 0, 0) as (model, _), torch.no_grad():
        ours = model(rows, **options).logits
        theirs = tiny.build("llama")(rows, **options).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours[0], ours[1], atol=1e-2)


def test_long_prefill_travels_in_chunks(llama: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    full, split = llama
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5 * 32 * 4)
    sent = record_requests(monkeypatch)
    assert padded_batch(split).tolist() == padded_batch(full).tolist()
    assert len(sent) >= 7 + 9
    assert beams(split).tolist() == beams(full).tolist()


@pytest.mark.numbers
def test_frequencies_that_depend_on_the_largest_position(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row, or a chunk of a prompt, is given the frequencies of the whole call, as in the unsplit model."""
    full = tiny.build("llama", rope_parameters=tiny.LONGROPE)
    with joined(broker, tiny.save("llama", tmp_path, rope_parameters=tiny.LONGROPE)) as (model, _):
        long = PROMPT.repeat(1, 3)
        assert padded_batch(model).tolist() == padded_batch(full).tolist()
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 5 * 32 * 4)
        for mode in (padded_batch, beams, lambda model: model.generate(long, **GREEDY)):
            assert mode(model).tolist() == mode(full).tolist()


def test_threads_share_a_model(llama: tuple[Model, Model]) -> None:
    """Calls of several threads do not see each other's masks and positions."""
    full, split = llama
    prompts = [BATCH[:1, 4:], PROMPT, BATCH[1:2, 1:], REPETITIVE]
    expected = [full.generate(prompt, **GREEDY).tolist() for prompt in prompts]
    answers: dict[int, Any] = {}

    def ask(index: int) -> None:
        answers[index] = [split.generate(prompts[index], **GREEDY).tolist() for _ in range(3)]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(prompts))] == [[tokens] * 3 for tokens in expected]


def test_defaults_of_generate_are_the_checkpoints(broker: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    path = tmp_path / "generation_config.json"
    defaults = json.loads(path.read_text()) | {
        "eos_token_id": [44, 12],
        "do_sample": True,
        "top_k": 3,
        "cache_implementation": "static",
    }
    path.write_text(json.dumps(defaults))
    with joined(broker, tmp_path) as (model, _):
        assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([44, 12], 3)
        assert model.name_or_path == str(tmp_path)
        # The device's cache must grow, whatever the checkpoint prefers.
        model.generate(PROMPT, max_new_tokens=3)


@pytest.mark.numbers
def test_bfloat16(broker: str, checkpoint: Callable[[str], Path]) -> None:
    full = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16)
    with joined(broker, checkpoint("llama"), dtype="bfloat16") as (model, _), torch.no_grad():
        assert model.dtype == torch.bfloat16
        ours, theirs = model(PROMPT).logits, full(PROMPT).logits
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_seed_is_left_alone(broker: str, checkpoint: Callable[[str], Path]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with joined(broker, checkpoint("llama")):
        assert torch.rand(1) == expected


@pytest.mark.numbers
def test_the_layers_may_be_called_without_the_model_around_them(llama: tuple[Model, Model]) -> None:
    """The mask by its place, too: what is under padding must not be attended to."""
    with torch.no_grad():
        theirs, *ours = (
            owner(BATCH, *args, **named).last_hidden_state[MASK == 1]
            for owner, args, named in (
                (llama[0].model, (MASK,), {}),
                (llama[1].model, (MASK,), {}),
                (llama[1].model, (), {"attention_mask": MASK}),
            )
        )
    for states in ours:
        assert torch.allclose(states, theirs, atol=1e-4, rtol=1e-4)


def test_timings_cover_a_step(llama: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    _, split = llama
    split.timings.reset()
    split.generate(PROMPT, **GREEDY)
    assert split.timings.steps == GREEDY["max_new_tokens"]
    assert all(seconds > 0 for seconds in split.timings.seconds.values())
    sampling = split.timings.seconds["sampling"]
    # As if it had been a while since.
    later = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 600.0)
    monkeypatch.setattr("split_device.sessions.timings.time", later)
    split.generate(PROMPT, **{**GREEDY, "max_new_tokens": 1})
    assert split.timings.seconds["sampling"] - sampling < 600.0
