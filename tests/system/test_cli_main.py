from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
import typer

from split_common.cli import application as cli
from split_common.errors import ConfigError, SplitError
from split_common.system.console import emit_json

Capture = pytest.CaptureFixture[str]
AddCommand = Callable[[Callable[..., object]], None]


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """The entry points of an application without commands; a test appends its own."""
    found: list[EntryPoint] = []
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_group: found)
    monkeypatch.setattr(cli.app, "registered_commands", [])
    monkeypatch.setattr(cli.app, "registered_groups", [])
    cli.load_commands.cache_clear()
    yield found
    cli.load_commands.cache_clear()


@pytest.fixture
def command(entries: list[EntryPoint], monkeypatch: pytest.MonkeyPatch) -> AddCommand:
    """Makes a function the sub-command `go`, contributed by an entry point."""

    def add(function: Callable[..., object]) -> None:
        module = types.ModuleType("contributed")
        module.register = lambda app: app.command("go")(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "contributed", module)
        entries.append(EntryPoint("contributed", "contributed:register", cli.COMMANDS_GROUP))

    return add


def failing(error: BaseException) -> Callable[..., object]:
    def go(_as_json: bool = typer.Option(False, "--json")) -> None:
        raise error

    return go


def test_a_contributed_command_runs(command: AddCommand, capsys: Capture) -> None:
    command(lambda: emit_json({"text": "wörld"}))
    assert cli.main(["go"]) == 0
    assert capsys.readouterr().out == '{"text": "wörld"}\n'


@pytest.mark.parametrize("arguments", [["go"], ["go", "--json"]])
def test_a_device_that_takes_no_more(
    command: AddCommand, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def go(_as_json: bool = typer.Option(False, "--json")) -> None:
        print("an answer")

    command(go)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(arguments) == 1
    assert capsys.readouterr().err == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(("stream", "said"), [("stdout", "error: no such thing\n"), ("stderr", "")])
def test_an_error_and_a_device_that_takes_no_more(
    command: AddCommand, stream: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command(failing(ConfigError("no such thing")))
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, stream, full)
        assert cli.main(["go", "--json"]) == ConfigError.exit_code
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert capsys.readouterr().err == said


def test_a_path_that_the_system_refuses(command: AddCommand, capsys: Capture) -> None:
    name = "x" * 300
    command(lambda: print(Path(name).stat()))
    assert cli.main(["go"]) == ConfigError.exit_code
    assert capsys.readouterr().err == f"error: {name} cannot be used: File name too long\n"


@pytest.mark.usefixtures("entries")
def test_version(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lambda-split {version('lambda-split')}\n"


def test_no_arguments_are_a_call_for_help(command: AddCommand, capsys: Capture) -> None:
    command(lambda: None)
    assert cli.main([]) == 0
    output = capsys.readouterr()
    assert "Usage: lambda-split" in output.out
    assert "go" in output.out
    assert output.err == ""


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (SplitError("no\n worker\x1b[31m"), "error: no worker?[31m", 1),
        (ConfigError("pip install 'lambda-split[gguf]'"), "error: pip install 'lambda-split[gguf]'", 2),
        (
            ZeroDivisionError("oops"),
            "error: unexpected ZeroDivisionError: oops (run with LAMBDA_SPLIT_DEBUG=1 for the traceback)",
            70,
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            "error: torch is not installed, which this command needs: pip install lambda-split",
            2,
        ),
        (
            ModuleNotFoundError("No module named 'diffusers'", name="diffusers"),
            "error: diffusers is not installed, which this command needs: pip install 'lambda-split[diffusion]'",
            2,
        ),
        (typer.Abort(), "error: aborted", 1),
    ],
)
def test_an_error_is_one_line(
    command: AddCommand, capsys: Capture, error: BaseException, line: str, code: int
) -> None:
    command(failing(error))
    assert cli.main(["go"]) == code
    output = capsys.readouterr()
    assert output.err == line + "\n"
    assert output.out == ""


def test_an_error_with_json_is_also_one_object(command: AddCommand, capsys: Capture) -> None:
    command(failing(ConfigError("no such file")))
    assert cli.main(["go", "--json"]) == 2
    output = capsys.readouterr()
    assert json.loads(output.out) == {"error": {"type": "ConfigError", "message": "no such file"}}
    assert output.err == "error: no such file\n"


def test_wrong_usage_is_one_line_too(command: AddCommand, capsys: Capture) -> None:
    command(lambda: None)
    assert cli.main(["go", "--nonsense", "--json"]) == 2
    output = capsys.readouterr()
    assert output.err == "error: No such option: --nonsense; see `lambda-split go --help`\n"
    assert json.loads(output.out)["error"]["type"] == "NoSuchOption"


@pytest.mark.usefixtures("entries")
def test_a_group_without_its_command_prints_help_alone(capsys: Capture) -> None:
    group = typer.Typer(no_args_is_help=True)
    group.command("make")(lambda: None)
    group.command("show")(lambda: None)
    cli.app.add_typer(group, name="keys")
    assert cli.main(["keys"]) == 2
    output = capsys.readouterr()
    assert "make" in output.out + output.err
    assert "error" not in output.out + output.err


def test_the_traceback_shows_for_debugging_but_no_locals(
    command: AddCommand, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go() -> None:
        key = bytes.fromhex("5ec4e7")
        raise ZeroDivisionError(f"of {len(key)} bytes")

    monkeypatch.setenv("LAMBDA_SPLIT_DEBUG", "1")
    command(go)
    assert cli.main(["go"]) == 70
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "test_cli_main.py" in error
    assert repr(bytes.fromhex("5ec4e7")) not in error


def test_ctrl_c_exits_without_a_word(command: AddCommand, capsys: Capture) -> None:
    command(failing(KeyboardInterrupt()))
    assert cli.main(["go"]) == 130
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_after_the_end_changes_nothing() -> None:
    """The interpreter takes a moment to shut down."""
    program = "import os, signal, sys\nfrom split_common.cli import main\ncode = main()\n"
    program += "os.kill(os.getpid(), signal.SIGINT)\nsys.exit(code)\n"
    done = subprocess.run([sys.executable, "-c", program, "no-such"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_exit_codes_of_commands_pass_through(command: AddCommand) -> None:
    command(failing(typer.Exit(3)))
    assert cli.main(["go"]) == 3


def test_a_component_that_cannot_be_loaded_is_named(entries: list[EntryPoint], capsys: Capture) -> None:
    entries.append(EntryPoint("worker", "no_such_module:register", cli.COMMANDS_GROUP))
    assert cli.main(["--help"]) == 2
    assert capsys.readouterr().err == (
        "error: the 'worker' commands (no_such_module:register) cannot be loaded: "
        "ModuleNotFoundError: No module named 'no_such_module'\n"
    )


@pytest.mark.parametrize(
    ("args", "env", "level"),
    [
        (["go"], None, logging.WARNING),
        (["go"], "info", logging.INFO),
        (["--log-level", "DEBUG", "go"], "info", logging.DEBUG),
    ],
)
def test_log_level(
    command: AddCommand, monkeypatch: pytest.MonkeyPatch, args: list[str], env: str | None, level: int
) -> None:
    monkeypatch.delenv("LAMBDA_SPLIT_LOG", raising=False)
    if env is not None:
        monkeypatch.setenv("LAMBDA_SPLIT_LOG", env)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    seen: list[int] = []
    command(lambda: seen.append(root.level))
    assert cli.main(args) == 0
    assert seen == [level]


def test_a_reader_that_leaves_is_no_error() -> None:
    script = """
import sys
from split_common.cli import application as cli

cli.load_commands = lambda: None

@cli.app.command()
def spam():
    for number in range(100_000):
        print(number)

sys.exit(cli.main(["spam"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_an_error_reaches_stderr_though_the_reader_has_left() -> None:
    script = """
import sys
from split_common.cli import application as cli

cli.load_commands = lambda: None

@cli.app.command()
def go(_as_json: bool = cli.typer.Option(False, "--json")):
    sys.stdin.read()
    raise cli.ConfigError("no such thing")

sys.exit(cli.main(["go", "--json"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == "error: no such thing\n"
        assert process.wait() == ConfigError.exit_code


def test_the_command_starts_without_torch() -> None:
    script = (
        "import sys; from split_common.cli import application as cli; cli.load_commands();"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_buffers_of_large_messages_are_used_again() -> None:
    """Page faults of a hundred megabytes that come and go, two at a time: 256 for each that is mapped anew."""
    code = (
        "import resource, sys\nfrom split_common.system.process import reuse_memory\n"
        "if sys.argv[1:]: reuse_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "pairs = lambda: [(bytes(2**20), bytes(2**20)) and None for _ in range(50)]\n"
        "pairs(); before = faults(); pairs(); print(faults() - before)"
    )

    def faults(*arguments: str) -> int:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("reuse") < 1000 < faults()
