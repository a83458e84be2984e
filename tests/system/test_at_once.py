"""What commands say before they load anything that takes seconds."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from split_common.system import console

#: Runs commands where torch cannot be imported, so that each ends where it would begin to load. Prints, for each,
#: what it has printed by then.
COMMANDS = """
import contextlib, importlib.abc, io, json, sys
from split_common.cli import main

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())
said = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(arguments)
    said.append([out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""


def test_each_command_says_what_it_does_before_it_loads_torch(tmp_path: Path) -> None:
    model, pipeline = tmp_path / "tiny", tmp_path / "sdxl"
    model.mkdir()
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    requests = tmp_path / "in.jsonl"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    requests.write_text(json.dumps(line) + "\n")
    broker = ["--broker", "tcp://127.0.0.1:9"]
    here = ["--model", str(model), *broker]
    loading = "loading tiny, connecting to tcp://127.0.0.1:9 …"
    image = ["image", "a", "-o", str(tmp_path / "a.png"), "--model", str(pipeline), *broker, "--json"]
    first = {
        ("worker", *here): loading,
        ("generate", "a", *here, "--json"): loading,
        ("chat", *here): loading,
        ("ping", *here): loading,
        ("serve", "--port", "0", *here): loading,
        ("batch", str(requests), "-o", str(tmp_path / "out.jsonl"), *here): loading,
        tuple(image): "loading sdxl, connecting to tcp://127.0.0.1:9 …",
        ("doctor", "--json", *broker): "checking this machine, the broker and the workers …",
        ("inspect", str(model)): "reading the shapes of tiny …",
        ("stress",): "loading torch …",
        ("agent", "run"): "loading torch …",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([*first])], capture_output=True, text=True, check=True
    )
    for (arguments, line), (out, err) in zip(first.items(), json.loads(done.stdout), strict=True):
        # A batch says first which lines it answers.
        said = [line for line in err.splitlines() if not line.startswith("batch-")]
        assert said[0] == line, arguments
        # With --json, stdout has the one object: here, of the error.
        assert len(out.splitlines()) == ("--json" in arguments), arguments
        assert said[1:] == ["error: torch is not installed, which this command needs: pip install lambda-split"], (
            arguments
        )


def test_in_a_terminal_the_line_vanishes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=screen, force_terminal=True, width=80))
    with console.doing("loading [bold]tiny\x1b[2J"):
        print("a result")
    assert "loading [bold]tiny" in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()
    erased = screen.getvalue().rpartition("loading")[2]
    assert "\x1b[2K" in erased
    assert capsys.readouterr().out == "a result\n"
