"""Constrained answers: the tokens of the unsplit model with the same constraint, in fewer steps than tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import tiny
from fleet import joined, replaced, running_broker, split_model
from grammar_walk import ConstraintProcessor
from split_common.errors import ConfigError, UnsupportedFeature
from split_device.cli.answer_format import AnswerFormat
from split_device.generation import forced_tokens, turn_time
from split_device.generation.constraint import Grammars
from split_device.generation.generator import Generator, Request
from split_device.generation.limits import ONE_ANSWER
from split_device.generation.settings import Sampling
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tokenizing import encode_chat
from split_device.jobs.chat import Conversation
from split_device.jobs.job import ModelChoice
from split_device.jobs.models import Loaded
from wiretap import LATE

pytestmark = pytest.mark.usefixtures("patient_queue")

CUSTOMER = {
    "type": "object",
    "properties": {
        "customer_identification": {"type": "integer", "minimum": 10, "maximum": 99},
        "preferred_contact": {"enum": ["mail", "telephone"]},
        "notes": {"type": "string", "maxLength": 8},
    },
    "required": ["customer_identification", "preferred_contact", "notes"],
    "additionalProperties": False,
}

#: Constraints of many kinds; None for a free answer beside them.
CONSTRAINTS: list[StructuredOutputs | None] = [
    StructuredOutputs(json=CUSTOMER),
    None,
    StructuredOutputs(regex="(ab|cd){3}-forced-[0-9]{2}"),
    StructuredOutputs(choice=("yes", "no", "perhaps")),
    StructuredOutputs(choice=("only",)),
    StructuredOutputs(grammar='start: "(" start ")" | "[" start "]" | /[a-z]{2}/'),
    StructuredOutputs(json_object=True),
]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, tiny.VOCABULARY, {tokenizer.eos_token_id})


def config(sampling: bool, tokenizer: Any, **options: Any) -> GenerationConfig:
    more = {"temperature": 1.5, "top_k": 30} if sampling else {}
    return GenerationConfig(
        do_sample=sampling, max_new_tokens=120, eos_token_id=tokenizer.eos_token_id, **more, **options
    )


def asked(grammars: Grammars, tokenizer: Any, sampling: bool = False, **fields: Any) -> list[Request]:
    return [
        Request(
            [5, 17, 33 + index],
            config(sampling, tokenizer),
            seed=index if sampling else None,
            constraint=None if structured is None else grammars.constraint(structured),
            **fields,
        )
        for index, structured in enumerate(CONSTRAINTS)
    ]


def alone(model: Any, request: Request) -> list[int]:
    """What the unsplit model generates for one request, whose constraint is used up."""
    if request.seed is not None:
        torch.manual_seed(request.seed)
    ids = torch.tensor([request.prompt])
    processors = [] if request.constraint is None else [ConstraintProcessor(request.constraint, ids.shape[1])]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=request.config, logits_processor=processors
    )
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
def test_the_tokens_are_those_of_the_unsplit_model(
    slow: bool,
    sampling: bool,
    split: Any,
    unsplit: Any,
    grammars: Grammars,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if slow:
        # Each turn has time for one constraint, and for one of its tokens.
        monkeypatch.setattr(turn_time, "TURN_SECONDS", 0.0)
    wanted = [alone(unsplit, request) for request in asked(grammars, tokenizer, sampling)]
    with Generator(split) as generator:
        generations = [generator.submit(request) for request in asked(grammars, tokenizer, sampling)]
        assert [each.result(LATE) for each in generations] == wanted
        reasons = [each.finish_reason for each in generations]
        assert reasons == ["stop" if tokens[-1] == tokenizer.eos_token_id else "length" for tokens in wanted]
        assert generator.counters["tokens"] == sum(map(len, wanted))
    assert reasons[0] == reasons[2] == reasons[3] == reasons[4] == "stop"
    jsonschema.validate(json.loads(tokenizer.decode(wanted[0], skip_special_tokens=True)), CUSTOMER)
    assert tokenizer.decode(wanted[4], skip_special_tokens=True) == "only"


def test_what_is_forced_costs_no_trip(
    split: Any, grammars: Grammars, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Generator(split, speculate="off") as generator:

        def ask(structured: StructuredOutputs, **fields: Any) -> tuple[int, int]:
            """The numbers of tokens and steps of an answer."""
            before = generator.counters.copy()
            constraint = grammars.constraint(structured)
            generator.submit(Request([5, 17], config(False, tokenizer), constraint=constraint, **fields)).result(
                LATE
            )
            return tuple(generator.counters[name] - before[name] for name in ("tokens", "steps"))

        tokens, steps = ask(StructuredOutputs(json=CUSTOMER))
        assert tokens > 3 * steps
        # The first step has the beginning of both texts, the choice is made once, and the rest follows from it.
        assert ask(StructuredOutputs(choice=("which of it: this", "which of it: that"))) == (18, 1)
        assert ask(StructuredOutputs(choice=("only",))) == (5, 0)
        with monkeypatch.context() as patch:
            # A long text leaves the others their turns, and is the same.
            patch.setattr(forced_tokens, "MAX_FORCED", 4)
            assert ask(StructuredOutputs(choice=("only",))) == (5, 1)
        with monkeypatch.context() as patch:
            # So does one whose tokens take long.
            patch.setattr(turn_time, "TURN_SECONDS", 0.0)
            assert ask(StructuredOutputs(choice=("only",))) == (5, 5)
        # Log probabilities are made of logits, for which each token has to go through the model.
        assert ask(StructuredOutputs(choice=("only",)), logprobs=2) == (5, 5)


def test_drafts_of_slow_grammars_leave_others_their_turns(
    split: Any, grammars: Grammars, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a turn has no time for what a draft has, the tokens come one by one, and are the same."""
    structured = StructuredOutputs(regex="[ab]{60}")
    with Generator(split, speculate="suffix-recycle") as generator:

        def ask(constraint: bool) -> tuple[list[int], int]:
            """Tokens, and how many of them were drafted."""
            own = grammars.constraint(structured) if constraint else None
            found = generator.submit(Request([5, 17], config(False, tokenizer), constraint=own))
            return found.result(LATE), found.accepted_tokens

        tokens, drafted = ask(True)
        assert drafted > 0
        monkeypatch.setattr(turn_time, "TURN_SECONDS", 0.0)
        assert ask(True) == (tokens, 0)
        # Other answers are not concerned.
        assert ask(False)[1] > 0


@pytest.mark.long
def test_log_probabilities_and_prompts_that_are_scored(
    split: Any, unsplit: Any, grammars: Grammars, tokenizer: Any
) -> None:
    wanted = [alone(unsplit, request) for request in asked(grammars, tokenizer)]
    told: list[Any] = []
    with Generator(split) as generator:
        for fields in ({"logprobs": 1}, {"prompt_logprobs": 0}):
            requests = asked(grammars, tokenizer, **fields)
            generations = [generator.submit(each, lambda _, found, _state: told.append(found)) for each in requests]
            assert [each.result(LATE) for each in generations] == wanted
            if "logprobs" in fields:
                assert None not in told
            else:
                assert all(len(each.prompt_logprobs) == 3 for each in generations)


@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampling"])
def test_it_goes_on_where_it_was(
    sampling: bool, split: Any, unsplit: Any, grammars: Grammars, tokenizer: Any
) -> None:
    structured = StructuredOutputs(json=CUSTOMER)

    def request(**fields: Any) -> Request:
        constraint = grammars.constraint(structured)
        return Request([5, 17, 33], config(sampling, tokenizer), constraint=constraint, **fields)

    wanted = alone(unsplit, request(seed=4 if sampling else None))
    states: list[bytes | None] = []
    with Generator(split) as generator:
        first = request(seed=4 if sampling else None)
        generator.submit(first, lambda _token, _logprobs, state: states.append(state)).result(LATE)
        for done in (0, 1, 20, 32, len(wanted) - 1, len(wanted)):
            fields: dict[str, Any] = {"seed": 4} if not done and sampling else {}
            state = states[done - 1] if done else None
            generation = generator.submit(request(generated=wanted[:done], sampler=state, **fields))
            assert list(generation) == wanted[done:]
            assert generation.finish_reason == "stop"
        with pytest.raises(ConfigError, match="does not fit the grammar"):
            generator.submit(request(generated=[9], sampler=states[0]))


def test_other_settings_do_not_undo_a_constraint(
    split: Any, unsplit: Any, grammars: Grammars, tokenizer: Any
) -> None:
    """Bad words, a least length and top_k, of which each alone would leave no token."""
    hard = config(True, tokenizer, min_new_tokens=30)
    hard.top_k, hard.bad_words_ids = 1, [tokenizer("nly", add_special_tokens=False)["input_ids"]]

    def request(structured: StructuredOutputs) -> Request:
        return Request([5, 17], hard, seed=1, constraint=grammars.constraint(structured))

    with Generator(split) as generator:
        for structured in (StructuredOutputs(choice=("only",)), StructuredOutputs(regex="[a-z]{5}!")):
            tokens = generator.submit(request(structured)).result(LATE)
            assert tokens == alone(unsplit, request(structured))
            assert tokens[-1] == tokenizer.eos_token_id


def test_an_error_of_one_constraint_ends_one_request(
    split: Any, unsplit: Any, grammars: Grammars, tokenizer: Any
) -> None:
    class Failing:
        finished = False

        def __init__(self, fails_at: str) -> None:
            self.fails_at = fails_at

        def forced(self) -> None:
            assert self.fails_at != "forced", "forced"

        def mask(self) -> torch.Tensor:
            assert self.fails_at != "mask", "mask"
            return torch.ones(tiny.VOCABULARY, dtype=torch.bool)

        def accept(self, _token: int) -> None:
            assert self.fails_at != "accept", "accept"

    wanted = [alone(unsplit, request) for request in asked(grammars, tokenizer)]
    with Generator(split) as generator:
        generations = [generator.submit(request) for request in asked(grammars, tokenizer)]
        for at in ("forced", "mask", "accept"):
            failing: Any = Failing(at)
            with pytest.raises(AssertionError, match=at):
                generator.submit(Request([5], config(False, tokenizer), constraint=failing)).result(LATE)
        assert [each.result(LATE) for each in generations] == wanted


@pytest.mark.long
def test_a_worker_that_goes_away(checkpoint: Path, unsplit: Any, grammars: Grammars, tokenizer: Any) -> None:
    wanted = [alone(unsplit, request) for request in asked(grammars, tokenizer)]
    with (
        running_broker() as broker,
        joined(broker.address, checkpoint) as (model, worker),
        Generator(model) as generator,
        # At the first token that was chosen, after those that were forced.
        replaced(worker, checkpoint, broker.address, lambda: bool(generator.counters["steps"])) as strike,
    ):
        first, *rest = asked(grammars, tokenizer)
        generations = [generator.submit(first, strike), *map(generator.submit, rest)]
        assert [each.result(LATE) for each in generations] == wanted
        assert model.traffic["replays"] > 0


@pytest.mark.long
def test_models_whose_positions_interact(tmp_path: Path, grammars: Grammars, tokenizer: Any) -> None:
    """Their tokens have to go one by one."""
    checkpoint = tiny.save("llama", tmp_path / "longrope", rope_parameters=tiny.LONGROPE)
    full = tiny.build("llama", rope_parameters=tiny.LONGROPE)
    wanted = [alone(full, request) for request in asked(grammars, tokenizer)]
    with split_model(checkpoint) as model, Generator(model) as generator:
        generations = [generator.submit(request) for request in asked(grammars, tokenizer)]
        assert [each.result(LATE) for each in generations] == wanted


def test_a_conversation(split: Any, grammars: Grammars, unsplit: Any, tokenizer: Any) -> None:
    structured = StructuredOutputs(json=CUSTOMER)
    with Generator(split, limits=ONE_ANSWER) as generator:
        conversation = Conversation(Loaded(split, tokenizer, generator), ModelChoice(name="tiny"))
        sampling = Sampling(max_tokens=120, temperature=0.0)
        answers = [conversation.say(text, sampling, structured=structured) for text in ("Hello", "Again")]
    messages: list[Any] = []
    for text, answer in zip(("Hello", "Again"), answers, strict=True):
        messages.append({"role": "user", "content": text})
        prompt = encode_chat(tokenizer, messages)[0].tolist()
        config = GenerationConfig(max_new_tokens=120, do_sample=False, eos_token_id=sorted(grammars.ends))
        wanted = alone(unsplit, Request(prompt, config, constraint=grammars.constraint(structured)))
        assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), CUSTOMER)
        messages.append({"role": "assistant", "content": answer.text})


def test_options_become_constraints(tmp_path: Path) -> None:
    schema, broken = tmp_path / "schema.json", tmp_path / "broken.json"
    schema.write_text(json.dumps(CUSTOMER))
    broken.write_text("{")
    assert AnswerFormat().structured() is None
    assert AnswerFormat(json_schema=schema).structured() == StructuredOutputs(json=CUSTOMER)
    assert AnswerFormat(choice=["a", "b"]).structured() == StructuredOutputs(choice=("a", "b"))
    with pytest.raises(ConfigError, match="exactly one of"):
        AnswerFormat(json_schema=schema, regex="a").structured()
    with pytest.raises(ConfigError, match=r"broken\.json is not a JSON Schema"):
        AnswerFormat(json_schema=broken).structured()
    with pytest.raises(UnsupportedFeature, match="look-around"):
        AnswerFormat(regex="(?=a)b").structured()
