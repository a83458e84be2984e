"""Penalties, biases and the like give the same text from every command, in batches, and in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
from fleet import serving_here
from serving import Unsplit
from split_device.generation.drafting import Drafting
from split_device.generation.penalties import OccurrencePenalty
from split_device.jobs.job import ModelChoice
from split_device.serving.fields import ApiError
from split_device.serving.openai.requests import parse

SEED, TOKENS = 7, 12
HELLO = [{"role": "user", "content": "Hello"}]
PROMPT = "user:Hello</s>assistant:"

#: Fields of a body, and the same as options.
ASKED: dict[str, Any] = {
    "temperature": 1.5,
    "min_p": 0.05,
    "repetition_penalty": 1.5,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.25,
    "logit_bias": {"40": 2.5, "41": -100},
    "min_tokens": 4,
    "stop_token_ids": [50, 51],
    "ignore_eos": True,
    "speculate": "ngram",
}
OPTIONS = (
    *("--temperature", 1.5, "--min-p", 0.05, "--repetition-penalty", 1.5, "--frequency-penalty", 0.5),
    *("--presence-penalty", -0.25, "--logit-bias", '{"40": 2.5, "41": -100}', "--min-tokens", 4),
    *("--stop-token-id", 50, "--stop-token-id", 51, "--ignore-eos"),
)


@pytest.fixture(scope="module")
def here(checkpoint: Path) -> Iterator[tuple[Any, ...]]:
    with serving_here(checkpoint) as broker:
        yield ("--model", checkpoint, "--broker", broker, "--max-tokens", TOKENS, "--seed", SEED)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> str:
    prompt = len(AutoTokenizer.from_pretrained(checkpoint)(PROMPT)["input_ids"])
    return Unsplit(checkpoint).say(
        PROMPT,
        TOKENS,
        SEED,
        temperature=1.5,
        min_p=0.05,
        repetition_penalty=1.5,
        sequence_bias={(40,): 2.5, (41,): -100.0},
        min_new_tokens=4,
        eos_token_id=[50, 51],
        logits_processor=[OccurrencePenalty(prompt, 0.5, -0.25)],
    )


def test_what_is_thought_is_apart_from_the_answer(run: Any, here: tuple[Any, ...], tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{# <think></think> #}{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    )
    options = (*here, "--chat-template", template, "--regex", "<think>so</think>yes", "--max-tokens", 60)
    done = run("generate", "Hello", *options)
    assert (done.out, "so" in done.err.splitlines()) == ("yes\n", True)
    done = run("chat", *options, stdin="Hello\nAgain\n")
    assert (done.out, done.err.splitlines().count("so")) == ("yes\nyes\n", 2)
    told = json.loads(run("generate", "Hello", *options, "--json").out)
    assert (told["text"], told["reasoning"]) == ("yes", "so")
    # A text that is continued as it is has no such parts.
    assert run("generate", "Hello", *here, *options[-4:], "--raw").out == "<think>so</think>yes\n"


def test_commands(run: Any, here: tuple[Any, ...], wanted: str) -> None:
    assert run("generate", "Hello", *here, *OPTIONS).out.removesuffix("\n") == wanted
    assert run("chat", *here, *OPTIONS, stdin="Hello\n").out.removesuffix("\n") == wanted


def test_batches(
    run: Any, here: tuple[Any, ...], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of a line, and of the command, for prompts and for OpenAI's requests."""
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    drafters: list[str] = []
    begin = Drafting.choose

    def choose(self: Drafting, asked: str | None) -> str:
        drafters.append(begin(self, asked))
        return drafters[-1]

    monkeypatch.setattr(Drafting, "choose", choose)
    body = {"model": "m", "messages": HELLO, "max_tokens": TOKENS, "seed": SEED}
    chat = {"custom_id": "a", "url": "/v1/chat/completions", "body": body}
    cases: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
        "line": ({"id": "a", "prompt": "Hello"} | ASKED, ()),
        "command": ({"id": "a", "prompt": "Hello"}, OPTIONS),
        "body": (chat | {"body": body | ASKED}, ()),
        "default": (chat, OPTIONS),
    }
    for name, (line, options) in cases.items():
        source, target = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-out.txt"
        source.write_text(json.dumps(line) + "\n")
        more = ("--speculate", "suffix") if options else ()
        done = run("batch", source, "-o", target, "--format", "txt", *here, *options, *more)
        # The generator's default, and that of the request.
        assert drafters == (["suffix", "suffix"] if options else ["auto", "ngram"])
        drafters.clear()
        assert (done.code, target.read_text()) == (0, wanted.replace("\n", "\\n") + "\n"), (name, done.err)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 3),
        ("presence_penalty", "much"),
        ("repetition_penalty", 0),
        ("logit_bias", {"50256": 101}),
        ("logit_bias", {"word": 1}),
        ("min_p", 2),
        ("min_tokens", 100),
        ("stop_token_ids", [-1]),
        ("bad_words", [""]),
        ("ignore_eos", 1),
        ("speculate", "eagle"),
    ],
)
def test_fields_out_of_bounds(field: str, value: Any) -> None:
    body = {"model": "m", "messages": HELLO, "max_tokens": 20, field: value}
    with pytest.raises(ApiError) as refused:
        parse("chat", body, ModelChoice(name="tiny"))
    assert refused.value.status == 400
    assert str(refused.value.param).startswith(field)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--frequency-penalty", 2.5),
        ("--min-p", "nan"),
        ("--logit-bias", "x"),
        ("--logit-bias", '{"x": 1}'),
        ("--min-tokens", 10_000),
        ("--stop-token-id", -1),
        ("--bad-word", ""),
    ],
)
def test_options_out_of_bounds(run: Any, here: tuple[Any, ...], option: str, value: object) -> None:
    done = run("generate", "Hello", *here, option, value)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err


def test_tokens_that_the_model_does_not_have(run: Any, here: tuple[Any, ...]) -> None:
    done = run("generate", "Hello", *here, "--logit-bias", json.dumps({str(tiny.VOCABULARY): 1}))
    assert done.code == 2
    assert f"token {tiny.VOCABULARY} is not among" in done.err
