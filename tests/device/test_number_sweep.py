"""All numbers of requests, lines, jobs and commands at the edge: a value is used, or refused by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from test_options import commands, line

import tiny
from split_common.cli import application
from split_common.cli.numbers import bound_numbers
from split_common.errors import ConfigError, SplitError
from split_device import Device
from split_device.batches.parsing import parsed
from split_device.batches.prompt_lines import _Object
from split_device.batches.settings import BatchModels, BatchSettings
from split_device.batches.source import open_source
from split_device.generation.settings import Sampling
from split_device.images.settings import ImageSettings
from split_device.jobs.job import ImageChoice, ModelChoice
from split_device.jobs.store import Store
from split_device.serving.fields import ApiError
from split_device.serving.openai.chat import ChatBody
from split_device.serving.openai.image_requests import ImageBody, parse_image
from split_device.serving.openai.requests import parse
from split_device.serving.openai.text import TextBody

#: Values that clients and users send, by intent or by mistake.
EDGES: list[Any] = [
    *(0, -1, 1.0, 0.5, -0.0, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, -(2**63) - 1, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, True, "1", None, [], [1], {}, {"1": 1}),
]

MODEL = ModelChoice(name="m")


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))


def numeric(type_: type) -> list[str]:
    """The fields of a struct or dataclass that are numbers, or hold some."""
    return [field.name for field in msgspec.inspect.type_info(type_).fields if _has_number(field.type)]  # type: ignore[union-attr]


def _has_number(type_: Any) -> bool:
    if isinstance(type_, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        return True
    if isinstance(type_, msgspec.inspect.UnionType):
        return any(map(_has_number, type_.types))
    inner = [getattr(type_, name, None) for name in ("item_type", "key_type", "value_type")]
    return any(_has_number(each) for each in inner if each is not None)


def refusal(error: SplitError, name: str) -> str:
    """What is said of a value. Raises AssertionError if that does not name the field."""
    message = str(error)
    assert getattr(error, "status", 400) == 400
    assert name in message or name in (getattr(error, "param", None) or ""), (name, message)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("kind", "body"), [("chat", ChatBody), ("text", TextBody)])
def test_bodies_of_completions(tmp_path: Path, kind: Any, body: type) -> None:
    rest = {"messages": [{"role": "user", "content": "Hi"}]} if kind == "chat" else {"prompt": "Hi"}
    with Store(tmp_path / "jobs.db") as store:
        for name in numeric(body):
            for value in EDGES:
                try:
                    query = parse(kind, {"model": "m", **rest, name: value}, MODEL)
                except ApiError as error:
                    refusal(error, name)
                else:
                    for task in query.tasks[:2]:
                        store.submit(task)


def test_bodies_of_images() -> None:
    for name in numeric(ImageBody):
        for value in EDGES:
            try:
                parse_image({"prompt": "a cat", "model": "m", name: value}).settings(1)[0].checked()
            except (ApiError, ConfigError) as error:
                refusal(error, name)


@pytest.mark.parametrize("name", numeric(_Object))
def test_lines_of_a_batch(tmp_path: Path, name: str) -> None:
    def no_image() -> ImageChoice:
        raise ConfigError("no image model")

    source = tmp_path / "in.jsonl"
    values = [value for value in EDGES if not isinstance(value, float) or math.isfinite(value)]
    source.write_text("".join(f"{json.dumps({'prompt': 'Hi', name: value})}\n" for value in values))
    with open_source(source, None, False) as lines, Store(tmp_path / "jobs.db") as store:
        found = list(parsed(lines, BatchSettings(BatchModels(lambda: MODEL, no_image)), False, print))
        for line in found:
            if line.entry.error is not None:
                assert name in line.entry.error["message"], line.entry.error
            for task in line.tasks[:2]:
                store.submit(task)
    assert len(found) == len(values)


@pytest.mark.parametrize("type_", [Sampling, ImageSettings])
def test_settings_from_python(type_: Any) -> None:
    for name in numeric(type_):
        for value in EDGES:
            try:
                checked = type_(**{name: value}).checked()
            except ConfigError as error:
                refusal(error, name)
            else:
                msgspec.json.decode(msgspec.json.encode(checked))


@pytest.mark.parametrize("name", [*numeric(Sampling), "priority"])
def test_jobs_from_python(tmp_path: Path, name: str) -> None:
    device = Device(tmp_path)
    for value in EDGES:
        try:
            job = device.submit("Hello", **{name: value}).job()
        except ConfigError as error:
            refusal(error, name)
        else:
            assert job.task.prompt


def options() -> Iterator[tuple[str, Any, str]]:
    """The options of all commands, each with one of those that have it with this type and these bounds."""
    application.load_commands()
    command = typer.main.get_command(application.app)
    bound_numbers(command)
    known = set()
    for path, each in commands(command):
        for parameter in each.params:
            if parameter.param_type_name != "option" or getattr(parameter, "is_flag", False):
                continue
            if (described := line(parameter)) not in known:
                known.add(described)
                yield path, each, parameter.opts[0]


WORDS = [
    *(
        "0",
        "-1",
        "1.0",
        "0.5",
        "2147483648",
        "9007199254740993",
        str(2**63),
        str(2**64),
        "1e308",
        "1e400",
        "9" * 400,
    ),
    *("nan", "inf", "-inf", "true", "null", "", "0x10", "1_000", "١"),
]


def refused_as_commands_do(error: Any, what: object) -> None:
    message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    assert len(message.splitlines()) == 1, what
    assert error.exit_code == 2, what


def test_options_of_commands() -> None:
    """Whatever a value is, an option takes it, or refuses it as commands do. No command runs."""
    tried = 0
    for path, command, option in options():
        for word in WORDS:
            try:
                command.make_context(path, [f"{option}={word}"], resilient_parsing=False)
            except (typer.TyperException, SplitError) as error:
                refused_as_commands_do(error, (path, option, word))
            tried += 1
    assert tried > 1000


def test_jobs_from_the_command_line(run: Any, tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny"))
    for name in [*numeric(Sampling), "priority"]:
        option = f"--{name.replace('_', '-')}"
        for word in ("0", "1", str(2**63), "5e-324", "1e308"):
            done = run("submit", "Hello", f"{option}={word}", "--model", checkpoint)
            assert done.code in (0, 2), (option, word, done.err)
            # That no agent is running, or what is wrong.
            assert len(done.err.splitlines()) == 1, (option, word, done.err)
