"""The model that most tests of a device use, a tiny Llama with a tokenizer; a module may have another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import tiny
from fleet import split_model


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
