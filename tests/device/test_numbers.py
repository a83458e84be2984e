"""Numbers at the edge, on the command line, in OpenAI's formats, in jobs and from Python: one set of bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fleet import serving_here
from split_common.cli.options import parse_size
from split_common.errors import ConfigError
from split_device import Device, ImageDevice
from split_device.generation.settings import BOUNDS, Sampling, nth_seed
from split_device.images.settings import ImageSettings
from split_device.jobs.job import ModelChoice
from split_device.serving.fields import ApiError
from split_device.serving.openai.requests import parse
from split_device.sessions.connection import Connection

HELLO = [{"role": "user", "content": "Hello"}]
MODEL = ModelChoice(name="tiny")


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Any:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny"))
    with serving_here(checkpoint) as broker:
        yield ("--model", checkpoint, "--broker", broker)


# --- sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", 1, "--top-p", 0),
        ("--temperature", 1e-8),
        ("--temperature", 1e-40),
        ("--temperature", 1, "--top-k", 1, "--seed", 2**64 - 1),
        ("--temperature", 1, "--top-k", 1, "--seed", -(2**63)),
        ("--top-k", -1, "--max-tokens", 4),
    ],
    ids=str,
)
def test_the_likeliest_token(run: Any, queue: tuple[Any, ...], options: tuple[Any, ...]) -> None:
    greedy = run("generate", "Hello", "--max-tokens", 4, *queue)
    done = run("generate", "Hello", "--max-tokens", 4, *options, *queue)
    assert (done.code, done.out) == (0, greedy.out)


def test_counts_beyond_everything_end_with_the_models_positions(run: Any, queue: tuple[Any, ...]) -> None:
    options = ("--max-tokens", 10**18, "--temperature", 1, "--top-k", 10**18, "--seed", 2**63, "--json")
    done = run("generate", "Hello", *options, "--patience", 1e8, "--step-timeout", 1e8, "--timeout", 1e8, *queue)
    assert done.code == 0, done.err
    assert done.json["prompt_tokens"] + done.json["tokens"] <= 256


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)])
def test_a_seed_is_the_same_for_one_request_and_for_many(seed: int) -> None:
    torch.manual_seed(seed)
    expected = torch.initial_seed()
    assert torch.Generator().manual_seed(Sampling(seed=seed).checked().seed % 2**64).initial_seed() == expected


def test_seeds_of_choices_wrap() -> None:
    assert [nth_seed(2**64 - 2, index) for index in range(3)] == [2**64 - 2, 2**64 - 1, 0]
    assert [nth_seed(-1, index) for index in range(2)] == [-1, 0]
    for name in ("max_tokens", "seed"):
        assert BOUNDS[name].high <= 2**64 - 1, "a job's numbers are stored in 64 bits"


# --- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "chat", "submit"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", 2**64),
        ("--seed", -(2**63) - 1),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "-1"),
        ("--top-p", "nan"),
        ("--top-p", "1.1"),
        ("--top-k", -2),
        ("--max-tokens", 0),
        ("--max-tokens", 10**30),
        ("--max-tokens", "5.5"),
    ],
)
def test_options_of_texts(run: Any, command: str, option: str, value: object) -> None:
    done = run(command, *(() if command == "chat" else ("Hello",)), option, value, "--model", "/none")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "Hi", "--timeout", "inf"),
        ("generate", "Hi", "--patience", "nan"),
        ("chat", "--step-timeout", "1e300"),
        ("generate", "Hi", "--history-memory", "9" * 400),
        ("serve", "--kv-memory", "99999999999TiB"),
        ("batch", "in", "-o", "out", "--give-up", "inf"),
        ("agent", "start", "--timeout", "nan"),
        ("agent", "stop", "--timeout", "1e10"),
        ("agent", "logs", "--lines", 10**30),
        ("jobs", "list", "--limit", 10**30),
        ("submit", "Hi", "--priority", 10**30),
        ("submit", "Hi", "--priority", 2**31),
        ("image", "a", "-o", "a.png", "--guidance", "nan"),
        ("image", "a", "-o", "a.png", "--seed", 2**64),
        ("image", "a", "-o", "a.png", "--strength", "nan"),
        ("stress", "--seconds", "inf"),
        ("stress", "--seed", 2**64),
        ("worker", "--idle-timeout", "nan"),
        ("worker", "--drain-timeout", "inf"),
        ("doctor", "--timeout", "inf"),
    ],
    ids=lambda words: " ".join(map(str, words))[:60],
)
def test_no_option_takes_a_number_out_of_all_bounds(run: Any, words: tuple[object, ...]) -> None:
    done = run(*words)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err


def test_sizes() -> None:
    assert parse_size("4GiB") == 4 * 2**30
    for size in ("9" * 400, "8388608TiB"):
        with pytest.raises(ConfigError, match="63 bits"):
            parse_size(size)


# --- OpenAI's formats --------------------------------------------------------------------------------------


def sampling(**fields: Any) -> Sampling:
    (task,) = parse("chat", {"model": "m", "messages": HELLO, **fields}, MODEL).tasks
    return task.sampling


def test_numbers_that_are_integral_are_integers() -> None:
    assert sampling(max_tokens=5.0, seed=3.0, n=1.0, temperature=1, top_p=1) == Sampling(5, 1.0, 1.0, None, 3)
    assert sampling(max_completion_tokens=7.0).max_tokens == 7
    assert sampling(max_tokens=10**18).max_tokens == 10**18


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"top_p": 0}, {"temperature": 1e-40}], ids=str)
def test_greedy_in_openais_format(fields: dict[str, Any]) -> None:
    assert sampling(**fields).options()["do_sample"] is False


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63, -(2**63)])
def test_seeds_in_openais_format(seed: int) -> None:
    assert sampling(seed=seed).seed == seed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", math.nan),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", math.inf),
        ("top_p", -0.1),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 10**30),
        ("max_tokens", 1.5),
        ("max_tokens", math.inf),
        ("max_tokens", True),
        ("max_completion_tokens", -1),
        ("n", 0),
        ("n", 1e300),
        ("n", math.nan),
    ],
)
def test_fields_out_of_bounds(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as refused:
        sampling(**{field: value})
    assert (refused.value.status, refused.value.param) == (400, field)
    assert field in str(refused.value)


# --- from Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", math.nan), ("top_p", 2), ("seed", 2**64), ("max_tokens", 10**30), ("max_tokens", "5")],
)
def test_jobs_from_python(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        Device(tmp_path).submit("Hello", **{field: value})


def test_a_job_takes_integral_numbers(tmp_path: Path) -> None:
    job = Device(tmp_path).submit("Hello", max_tokens=5.0, seed=2**64 - 1, temperature=1, priority=3.0)
    assert job.job().task.sampling == Sampling(5, 1.0, None, None, 2**64 - 1)
    with pytest.raises(ConfigError, match="priority"):
        Device(tmp_path).submit("Hello", priority=2**70)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("steps", 10**6), ("guidance", math.inf), ("seed", 2**64)]
)
def test_images_from_python(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "model_index.json").touch()
    with pytest.raises(ConfigError, match=field):
        ImageDevice(tmp_path).submit("a digit", **{field: value})
    assert ImageSettings(steps=5.0, guidance=7, seed=2**64 - 1).checked() == ImageSettings(
        5, None, None, 7.0, None, 2**64 - 1
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("timeout", math.inf), ("patience", math.nan), ("step_timeout", -1), ("history_memory", 2**63)],
)
def test_connections(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Connection(**{field: value})  # type: ignore[arg-type]
