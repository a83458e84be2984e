"""Options of commands: all of them are those of a list, and the objects that they make arrive."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import tiny
from fleet import running_broker, start_worker
from split_common.cli import application
from split_common.cli.groups import Group, grouped
from split_common.errors import SplitError
from split_common.models.split import Split
from split_common.system.process import running_command
from split_device import Connection, Device, Generator, Limits, Sampling, SplitModelForCausalLM
from split_device.jobs import agent, models
from split_device.jobs.job import ModelChoice, Task
from split_device.models.hardware import Hardware

#: One line for each argument and option of each command. A line that changes is a change that users see.
GOLDEN = Path(__file__).parents[1] / "golden" / "options.txt"


def commands(command: Any, path: str = "lambda-split") -> Iterator[tuple[str, Any]]:
    """All commands and groups, by the words that call them."""
    yield path, command
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from commands(inner, f"{path} {name}")


def line(parameter: Any) -> str:
    """What users can write for a parameter, and what it is if they do not."""
    words = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        words = []
    if not getattr(parameter, "is_flag", False):
        choices = parameter.type_descriptor.choices
        words.append("|".join(choices) if choices else parameter.metavar or parameter.name.upper())
    if parameter.min is not None or parameter.max is not None:
        words.append("..".join("" if bound is None else f"{bound:g}" for bound in (parameter.min, parameter.max)))
    if parameter.multiple or parameter.nargs == -1:
        words.append("repeated")
    if parameter.required:
        words.append("required")
    elif isinstance(parameter.show_default, str) or not (parameter.default is None or parameter.default is False):
        shown = parameter.show_default
        words.append(f"= {shown if isinstance(shown, str) else parameter.default}")
    if parameter.envvar:
        words.append(f"${parameter.envvar}")
    if parameter.hidden:
        words.append("hidden")
    return " ".join(words)


def test_options_stay() -> None:
    application.load_commands()
    lines = [
        f"{path}: {line(parameter)}"
        for path, command in commands(typer.main.get_command(application.app))
        for parameter in sorted(command.params, key=line)
    ]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()


# --- objects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oven:
    degrees: int = 180
    fan: bool = False
    minutes: int = 30


@dataclass(frozen=True)
class Timer:
    minutes: int = 30


Minutes = Annotated[int, typer.Option("--minutes")]
OVEN = Group(degrees=Annotated[int, typer.Option(envvar="DEGREES")], minutes=Minutes)


def called(command: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(grouped(command))
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_fields_are_options_with_the_defaults_of_their_object(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def bake(
        what: Annotated[str, typer.Argument()],
        oven: Annotated[Oven, OVEN] = Oven(degrees=200, fan=True),
        often: Annotated[int, typer.Option()] = 1,
    ) -> None:
        made.append((what, oven, often))

    assert called(bake, "bread").exit_code == 0
    assert called(bake, "cake", "--degrees", "170", "--minutes", "45", "--often", "2").exit_code == 0
    monkeypatch.setenv("DEGREES", "90")
    assert called(bake, "meringue").exit_code == 0
    assert made == [
        ("bread", Oven(200, True, 30), 1),
        ("cake", Oven(170, True, 45), 2),
        ("meringue", Oven(90, True, 30), 1),
    ]
    assert called(bake, "bread", "--fan").exit_code == 2


def test_objects_share_an_option_of_one_name() -> None:
    made: list[Any] = []

    def bake(oven: Annotated[Oven, OVEN], timer: Annotated[Timer, Group(minutes=Minutes)]) -> None:
        made.append((oven.minutes, timer.minutes))

    assert called(bake, "--minutes", "5").exit_code == 0
    assert made == [(5, 5)]


def test_two_options_of_one_name_are_refused() -> None:
    def bake(oven: Annotated[Oven, OVEN], minutes: Annotated[int, typer.Option()] = 3) -> None:
        pass

    with pytest.raises(TypeError, match="minutes"):
        grouped(bake)


def test_options_can_be_left_out() -> None:
    def bake(oven: Annotated[Oven, OVEN.without("minutes")]) -> None:
        assert oven == Oven(degrees=1)

    assert called(bake, "--degrees", "1").exit_code == 0
    assert called(bake, "--degrees", "1", "--minutes", "1").exit_code == 2


# --- they arrive -------------------------------------------------------------------------------------------

QUEUE = (
    *("--broker", "tcp://127.0.0.1:9", "--member", "me", "--timeout", "3", "--patience", "4"),
    *("--step-timeout", "7", "--history-memory", "2MiB"),
)
COMPUTE = ("--device", "cpu", "--threads", 3)
CONNECTION = Connection("tcp://127.0.0.1:9", None, "me", 3.0, 4.0, 7.0, 2 * 1024**2)


class Enough(SplitError):
    """The objects have arrived."""


@pytest.mark.parametrize("command", ["serve", "batch", "agent"])
def test_how_to_connect_arrives_where_models_are_loaded(
    command: str, run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Models:
        def __init__(self, connection: Connection, limits: Limits, hardware: Hardware) -> None:
            seen.extend((connection, limits, hardware))
            raise Enough

    monkeypatch.setattr(models, "Models", Models)
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    source = tmp_path / "in.jsonl"
    body = {"model": "any", "prompt": "Once"}
    request = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": body}
    source.write_text(json.dumps(request))
    arguments = {
        "serve": ["serve", "--model", checkpoint, "--port", 0],
        "batch": ["batch", source, "-o", tmp_path / "out.jsonl", "--model", checkpoint],
        "agent": ["agent", "run"],
    }[command]
    assert run(*arguments, "--max-jobs", 3, "--kv-memory", "1MiB", *QUEUE, *COMPUTE).code == 1
    assert seen == [CONNECTION, Limits(requests=3, kv_memory=1024**2), Hardware("cpu", 3)]


def test_an_agent_in_the_background_is_told_what_stands_on_the_command_line(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    environments: list[dict[str, str]] = []

    def start(options: list[str], env: dict[str, str]) -> dict[str, Any]:
        seen.extend(options)
        environments.append(env)
        return {"pid": 1}

    monkeypatch.setattr(agent, "start", start)
    assert run("agent", "start", "--json").code == 0
    assert not seen
    assert run("agent", "start", "--keep", "7d", "--max-images", 3, *QUEUE, *COMPUTE, "--json").code == 0
    words = iter(seen)
    assert environments[-1] == {"LAMBDA_SPLIT_BROKER": "tcp://127.0.0.1:9"}
    assert dict(zip(words, words, strict=True)) == {
        "--member": "me",
        "--timeout": "3.0",
        "--patience": "4.0",
        "--step-timeout": "7.0",
        "--history-memory": str(2 * 1024**2),
        "--device": "cpu",
        "--threads": "3",
        "--max-images": "3",
        "--keep": "7d",
    }


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_as_many_threads_compute_as_are_asked_for(run: Any, checkpoint: Path) -> None:
    with running_broker() as broker:
        worker = start_worker(checkpoint, broker.address)
        here = ("--model", checkpoint, "--broker", broker.address, "--max-tokens", 4)
        for threads in (3, 2):
            assert run("generate", "Hello", *here, "--device", "cpu", "--threads", threads).code == 0
            assert torch.get_num_threads() == threads
        worker.stop()


@pytest.mark.parametrize("command", [("generate", "Hello"), ("chat",), ("serve", "--port", 0)])
def test_a_device_without_a_gpu_says_so(run: Any, checkpoint: Path, command: tuple[Any, ...]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(*command, "--model", checkpoint, "--device", "cuda")
    assert done.code == 2
    assert "torch sees no CUDA device: use --device cpu" in done.err


def test_a_loaded_model_keeps_to_them(checkpoint: Path) -> None:
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker):
        connection = Connection(broker["address"], step_timeout=7.0, history_memory=2 * 1024**2)
        with models.Models(connection, Limits(requests=3)) as loaded:
            parts = loaded.get(ModelChoice(name=str(checkpoint))).model.split_parts
            assert (parts.client.step_timeout, parts.history_memory) == (7.0, 2 * 1024**2)


# --- from Python -------------------------------------------------------------------------------------------


def test_a_model_takes_an_object_or_single_names(checkpoint: Path) -> None:
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker):
        connection = Connection(broker["address"], patience=5.0, step_timeout=7.0)
        with SplitModelForCausalLM.from_pretrained(checkpoint, connection=connection, patience=6.0) as split:
            client = split._client
            assert (client.patience, client.step_timeout) == (6.0, 7.0)
            for options, most in (({}, 2), ({"max_requests": 3}, 3)):
                with Generator(split, limits=Limits(requests=2), **options) as generator:
                    assert generator._admission._places == most
    with pytest.raises(TypeError, match="patients"):
        SplitModelForCausalLM.from_pretrained(checkpoint, patients=6.0)


def test_a_job_takes_an_object_or_single_names(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    device = Device(checkpoint)
    wanted = Sampling(max_tokens=5, temperature=0.5, seed=3)
    for job in (
        device.submit("Hello", sampling=wanted),
        device.submit("Hello", sampling=Sampling(max_tokens=5, seed=3), temperature=0.5),
        device.submit("Hello", max_tokens=5, temperature=0.5, seed=3),
    ):
        task = job.job().task
        assert isinstance(task, Task)
        assert task.sampling == wanted


# --- where a model is cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["2:-3", "2:3", ":", ":-1", "1:"])
def test_a_worker_and_a_device_read_the_same_layers(layers: str, run: Any, checkpoint: Path) -> None:
    body = Split.parse(tiny.LAYERS, layers)
    parts = run("inspect", checkpoint, f"--layers={layers}", "--json").json["parts"]
    assert {part["name"]: part["layers"] for part in parts}["body"] == f"{body.first}:{body.last}"


@pytest.mark.parametrize(("old", "new"), [(("1", "3"), "1:-3"), (("1", None), "1:-2"), ((None, "0"), "2:")])
def test_layers_have_old_names(old: tuple[str | None, str | None], new: str, run: Any, checkpoint: Path) -> None:
    given = [
        word
        for name, value in zip(("--head-layers", "--tail-layers"), old, strict=True)
        if value is not None
        for word in (name, value)
    ]
    done = run("inspect", checkpoint, *given, "--json")
    assert done.json == run("inspect", checkpoint, "--layers", new, "--json").json
    assert f"warning: {given[0]} is an old name: use --layers FIRST:LAST" in done.err


def test_old_and_new_names_of_layers_exclude_each_other(run: Any, checkpoint: Path) -> None:
    assert run("inspect", checkpoint, "--layers", "2:-2", "--head-layers", 2).code == 2


def test_stopping_an_agent_has_an_old_option(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    done = run("agent", "stop", "--timeout", 3)
    assert done.code == 0
    assert "warning: --timeout is an old name: use --grace" in done.err
    assert "warning" not in run("agent", "stop", "--grace", 3).err
