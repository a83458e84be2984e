"""How tokens are chosen, in one order everywhere: the request, the command, the checkpoint, else greedily."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

import tiny
from fleet import running_broker, start_worker
from serving import KEY, Unsplit
from split_common.cli import main
from split_common.system.process import running_command
from split_device import Sampling
from split_device.generation.settings import OPENAI_DEFAULTS
from split_device.jobs.job import Message, ModelChoice, Task
from split_device.serving.openai.requests import parse

#: What the sampling checkpoint says. It names no top_k, for which transformers takes 50.
DEFAULTS = {"do_sample": True, "temperature": 3.0, "top_p": 0.9}

TOKENS, SEED = 12, 7

HELLO = "user:Hello</s>assistant:"


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Path]:
    """A checkpoint that does not sample; its layers are served."""
    directory = tiny.save_tokenizer(tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny"))
    worker = start_worker(directory, broker)
    yield directory
    worker.stop()


@pytest.fixture(scope="module")
def sampling(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same one, whose defaults sample."""
    copy = tmp_path_factory.mktemp("sampling") / checkpoint.name
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "generation_config.json":
            (copy / file.name).symlink_to(file)
    own = json.loads((checkpoint / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(own | DEFAULTS))
    return copy


@pytest.fixture(scope="module")
def unsplit(checkpoint: Path) -> Unsplit:
    return Unsplit(checkpoint)


def test_the_tests_can_tell_one_from_another(unsplit: Unsplit) -> None:
    texts = {
        unsplit.say(HELLO, TOKENS),
        unsplit.say(HELLO, TOKENS, SEED),
        unsplit.say(HELLO, TOKENS, SEED, temperature=3.0, top_p=0.9, top_k=50),
        unsplit.say(HELLO, TOKENS, SEED, temperature=3.0, top_p=0.9, top_k=5),
    }
    assert len(texts) == 4


# --- the order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "defaults", "wanted"),
    [
        ({}, {}, (0.0, 1.0, 0)),
        ({}, {"temperature": 0.6, "top_p": 0.8}, (0.0, 0.8, 0)),
        ({}, {"do_sample": True}, (1.0, 1.0, 50)),
        ({}, DEFAULTS, (3.0, 0.9, 50)),
        ({}, DEFAULTS | {"top_k": 20}, (3.0, 0.9, 20)),
        ({"temperature": 0.0}, DEFAULTS, (0.0, 0.9, 50)),
        ({"temperature": 0.7}, {}, (0.7, 1.0, 0)),
        ({"temperature": 0.7, "top_p": 0.5, "top_k": 3}, DEFAULTS, (0.7, 0.5, 3)),
        ({"top_k": 0}, DEFAULTS, (3.0, 0.9, 0)),
        # They have an effect on sampling alone, so they ask for it.
        ({"top_p": 0.5}, {}, (1.0, 0.5, 0)),
        ({"top_k": 5}, {}, (1.0, 1.0, 5)),
        ({"top_p": 1.0}, {}, (0.0, 1.0, 0)),
        ({"top_p": 0.0}, DEFAULTS, (3.0, 0.0, 50)),
    ],
)
def test_what_is_not_asked_for_is_the_checkpoints(
    asked: dict[str, Any], defaults: dict[str, Any], wanted: tuple[float, float, int]
) -> None:
    resolved = Sampling(9, **asked, seed=3).resolved(GenerationConfig(**defaults))
    assert resolved == Sampling(9, *wanted, 3)
    assert resolved.options()["do_sample"] is (wanted[0] > 0 and wanted[1] > 0)


def test_the_checkpoints_defaults_are_read_as_transformers_reads_them(sampling: Path) -> None:
    """Of which top_k is the one that the checkpoint does not name."""
    model = AutoModelForCausalLM.from_pretrained(sampling)
    config, _ = model._prepare_generation_config(None)
    assert Sampling().resolved(model.generation_config).facts() == {
        name: getattr(config, name) for name in ("temperature", "top_p", "top_k")
    }


@pytest.mark.parametrize(
    ("fields", "defaults", "wanted"),
    [
        ({}, Sampling(), (None, None, None)),
        ({}, Sampling(temperature=0.5, top_k=9), (0.5, None, 9)),
        ({"temperature": 0}, Sampling(temperature=0.5, top_p=0.9), (0.0, 0.9, None)),
        ({"top_p": 0.1}, OPENAI_DEFAULTS, (1.0, 0.1, 0)),
        ({}, OPENAI_DEFAULTS, (1.0, 1.0, 0)),
    ],
)
def test_a_request_comes_before_the_command(
    fields: dict[str, Any], defaults: Sampling, wanted: tuple[Any, ...]
) -> None:
    body = {"model": "m", "prompt": "Once", **fields}
    (task,) = parse("text", body, ModelChoice(name="m"), defaults).tasks
    assert tuple(task.sampling.facts().values()) == wanted


@pytest.mark.parametrize(
    ("model", "given", "needs"),
    [
        ("greedy", {}, False),
        ("sampling", {}, True),
        ("broken", {}, True),
        # Its files may not be here yet.
        ("org/of-the-hub", {}, True),
        ("greedy", {"temperature": 0.5}, True),
        ("greedy", {"top_k": 5}, True),
        ("sampling", {"temperature": 0.0}, False),
        ("sampling", {"top_p": 0.0}, False),
    ],
)
def test_a_job_that_might_be_sampled_gets_a_seed(
    model: str, given: dict[str, Any], needs: bool, tmp_path: Path
) -> None:
    """Before the checkpoint is loaded."""
    contents = {"greedy": "{}", "sampling": json.dumps(DEFAULTS), "broken": "{"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "generation_config.json").write_text(content)
    choice = ModelChoice(name=str(tmp_path / model) if model in contents else model)
    task = Task(model=choice, prompt=(Message("user", "Hello"),), sampling=Sampling(**given))
    assert task.needs_seed is needs


# --- commands ----------------------------------------------------------------------------------------------


def test_commands_answer_as_the_checkpoint_says(
    run: Any, checkpoint: Path, sampling: Path, broker: str, unsplit: Unsplit
) -> None:
    def generate(model: Path, *options: object) -> str:
        here = ("--model", model, "--broker", broker, "--max-tokens", TOKENS, "--seed", SEED)
        return str(run("generate", "Hello", *here, *options).out.removesuffix("\n"))

    greedy = unsplit.say(HELLO, TOKENS)
    assert generate(checkpoint) == greedy
    assert generate(sampling, "--temperature", 0) == greedy
    assert generate(sampling) == unsplit.say(HELLO, TOKENS, SEED, temperature=3.0, top_p=0.9, top_k=50)
    own = unsplit.say(HELLO, TOKENS, SEED, temperature=3.0, top_p=0.9, top_k=5)
    assert generate(sampling, "--top-k", 5) == own
    talk = ("--model", sampling, "--broker", broker, "--max-tokens", TOKENS, "--seed", SEED, "--top-k", 5)
    assert run("chat", *talk, stdin="Hello\n").out.removesuffix("\n") == own


def test_generate_and_chat_end_before_a_stop_text(
    run: Any, checkpoint: Path, broker: str, unsplit: Unsplit
) -> None:
    here = ("--model", checkpoint, "--broker", broker, "--max-tokens", TOKENS, "--json")
    free = unsplit.say(HELLO, TOKENS)
    stop = free[5:7]
    answer = run("generate", "Hello", *here, "--stop", "never", "--stop", stop).json
    assert (answer["text"], answer["finish_reason"]) == (free[: free.index(stop)], "stop")
    assert answer["tokens"] < TOKENS
    (turn,) = run("chat", *here, "--stop", stop, stdin="Hello\n").json["turns"]
    assert turn["text"] == answer["text"]
    assert run("generate", "Hello", *here, "--stop", "never").json["text"] == free


def test_a_batch_answers_as_the_checkpoint_says(
    run: Any, sampling: Path, broker: str, unsplit: Unsplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": TOKENS, "seed": SEED}
    lines = [
        {"custom_id": name, "url": "/v1/chat/completions", "body": body | more}
        for name, more in (("own", {}), ("greedy", {"temperature": 0}))
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run(
        "batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--model", sampling, "--broker", broker
    )
    assert done.code == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers] == [
        unsplit.say(HELLO, TOKENS, SEED, temperature=3.0, top_p=0.9, top_k=50),
        unsplit.say(HELLO, TOKENS),
    ]


# --- the server --------------------------------------------------------------------------------------------


def ask(facts: dict[str, Any], **fields: Any) -> str:
    with openai.OpenAI(base_url=facts["url"], api_key=KEY, max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=TOKENS, **fields)
        return str(answer.choices[0].message.content)


def test_a_server_answers_as_its_options_and_the_checkpoint_say(
    sampling: Path, broker: str, unsplit: Unsplit
) -> None:
    command = ["serve", "--port", "0", "--model", str(sampling), "--broker", broker, "--top-p", "0.5"]
    with running_command(command, env={"LAMBDA_SPLIT_API_KEY": KEY}) as (_, facts):
        assert facts["defaults"] == {"temperature": 3.0, "top_p": 0.5, "top_k": 50}
        asked = unsplit.say(HELLO, TOKENS, SEED, temperature=3.0, top_p=0.5, top_k=50)
        assert ask(facts, seed=SEED) == asked
        assert ask(facts, temperature=0) == unsplit.say(HELLO, TOKENS)


@pytest.mark.long
def test_a_server_may_answer_as_openai_does(checkpoint: Path, broker: str, unsplit: Unsplit) -> None:
    command = ["serve", "--port", "0", "--model", str(checkpoint), "--broker", broker, "--openai-defaults"]
    with running_command(command, env={"LAMBDA_SPLIT_API_KEY": KEY}) as (_, facts):
        assert facts["defaults"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        assert ask(facts, seed=SEED) == unsplit.say(HELLO, TOKENS, SEED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--openai-defaults", "--top-p", "0.5"), "--openai-defaults and --top-p do not go together"),
        (("--image-model", "DIR", "--temperature", "1"), "--temperature is for texts: give --model, too"),
        (("--image-model", "DIR", "--openai-defaults"), "--openai-defaults is for texts"),
    ],
)
def test_options_that_a_server_refuses(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").touch()
    assert main(["serve", *(str(tmp_path) if option == "DIR" else option for option in options)]) == 2
    assert message in capsys.readouterr().err
