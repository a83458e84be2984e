"""lm-eval, which scores log probabilities, and the command `llm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from conftest import KEY, MODEL

QUESTIONS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Rome"),
    ("Two and two are", " four"),
    ("Water boils at one hundred degrees", " Celsius, and freezes at zero"),
]


def scored(model: Any) -> list[tuple[float, bool]]:
    asked = [
        Instance("loglikelihood", {}, pair, index, metadata=("none", index, 1))
        for index, pair in enumerate(QUESTIONS)
    ]
    return [(float(score), bool(greedy)) for score, greedy in model.loglikelihood(asked)]


def test_lm_eval_s_scores_are_those_of_the_unsplit_model(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from split_common.demo_model import ensure_demo_model

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    checkpoint = str(ensure_demo_model())
    split = get_model("local-completions")(
        model=MODEL,
        base_url=f"{url}/completions",
        tokenizer=checkpoint,
        tokenizer_backend="huggingface",
        max_length=2048,
    )
    whole = get_model("hf")(pretrained=checkpoint, device="cpu", dtype="float32")
    for (found, greedy), (expected, likeliest) in zip(scored(split), scored(whole), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest


def test_llm(url: str, tmp_path: Path) -> None:
    models = [{"model_id": "split", "model_name": MODEL, "api_base": url, "api_key_name": "split"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    command = Path(sys.executable).with_name("llm")
    done = subprocess.run(
        [command, "-m", "split", "--key", KEY, "-o", "max_tokens", "12", "-o", "temperature", "0"],
        input="What is the capital of France?",
        env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Paris" in done.stdout, done.stderr
