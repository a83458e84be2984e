"""`lambda-split demo --batch` and `--serve`: all processes of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

import tiny
from serving import Unsplit
from split_device.cli.demo.language import QUESTIONS

#: Seconds that something may take on a busy machine.
PATIENCE = 300.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokenizer(tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.mark.long
def test_a_batch(run: Any, checkpoint: Path) -> None:
    unsplit = Unsplit(checkpoint)
    done = run("demo", "--batch", "--model", checkpoint, "--max-tokens", 6, "--workers", 2, "--json")
    assert done.code == 0
    facts = done.json
    assert facts["answers"] == [
        {"prompt": question, "text": unsplit.say(f"user:{question}</s>assistant:", 6)} for question in QUESTIONS
    ]
    assert (facts["lines"], facts["errors"]) == (len(QUESTIONS), 0)
    assert facts["tokens"] == 6 * len(QUESTIONS)


@pytest.mark.long
def test_a_server(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "split_common", "demo", "--serve", "--model", str(checkpoint), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout is not None
            facts = json.loads(demo.stdout.readline())
            assert "<textarea" in httpx2.get(facts["page"]).text
            with openai.OpenAI(base_url=facts["url"], api_key="none", max_retries=0) as client:
                answer = client.completions.create(model="tiny", prompt="Once", temperature=0)
            assert answer.choices[0].text == Unsplit(checkpoint).say("Once", 16)
            children = psutil.Process(demo.pid).children(recursive=True)
            commands = [child for child in children if "split_common" in child.cmdline()]
            demo.send_signal(signal.SIGINT)
            _, err = demo.communicate(timeout=PATIENCE)
        finally:
            demo.kill()
    assert (demo.returncode, "Traceback" in err) == (130, False)
    _, left = psutil.wait_procs(children, timeout=PATIENCE)
    assert (len(commands), left) == (3, [])


def test_one_thing_at_a_time(run: Any) -> None:
    refused = run("demo", "--batch", "--serve")
    assert (refused.code, "only one" in refused.err) == (2, True)
    assert run("demo", "Hello", "--serve").code == 2
    for arguments in (("--image", "--workers", "2"), ("--image", "--model", "any"), ("-o", "sheet.png")):
        assert (run("demo", *arguments).code, run("demo", *arguments).out) == (2, "")
