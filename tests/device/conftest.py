"""What most tests of a device use: a tiny Llama with a tokenizer, and a state; a module may have another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import tiny
from fleet import split_model
from split_device.jobs.agent import running_agent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokenizer(tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def unsplit(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def split(checkpoint: Path) -> Iterator[Any]:
    with split_model(checkpoint) as model:
        yield model


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> Iterator[Path]:
    """A directory for a test's own jobs and batches. No agent is left of it."""
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    yield tmp_path / "state"
    run("agent", "stop")
    assert running_agent() is None
