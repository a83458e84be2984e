"""What a checkpoint says beside its weights: defaults of `generate`, end tokens, length, and added tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import tiny
from fleet import joined, running_broker, start_worker
from split_common.errors import ConfigError
from split_common.models.layer_stack import max_positions

PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80]])


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(scope="module")
def worker(checkpoint: Path, broker: str) -> Iterator[None]:
    running = start_worker(checkpoint, broker)
    yield
    running.stop()


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))


def with_defaults(checkpoint: Path, directory: Path, **defaults: Any) -> Path:
    """The same checkpoint under the same name, with further defaults for `generate`."""
    copy = directory / checkpoint.name
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "generation_config.json":
            (copy / file.name).symlink_to(file)
    own = json.loads((checkpoint / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(own | defaults))
    return copy


def by_generate(run: Any, model: Path, broker: str) -> Any:
    return run("generate", "Hello", "--max-tokens", 12, "--model", model, "--broker", broker)


def by_chat(run: Any, model: Path, broker: str) -> Any:
    return run("chat", "--max-tokens", 12, "--model", model, "--broker", broker, stdin="Hello\n")


def by_batch(run: Any, model: Path, broker: str, directory: Path) -> tuple[Any, dict[str, Any]]:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    line = {"custom_id": "a", "url": "/v1/chat/completions", "body": body}
    (directory / "in").write_text(json.dumps(line))
    done = run("batch", directory / "in", "-o", directory / "out", "--model", model, "--broker", broker)
    return done, json.loads((directory / "out").read_text())


@pytest.mark.parametrize(
    "defaults",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2, "return_dict_in_generate": True, "output_scores": True},
        {"use_cache": False, "output_attentions": True, "output_hidden_states": True},
    ],
    ids=str,
)
def test_every_command_does_what_the_checkpoint_says(
    run: Any, checkpoint: Path, broker: str, worker: None, tmp_path: Path, defaults: dict[str, Any]
) -> None:
    model = with_defaults(checkpoint, tmp_path, **defaults)
    tokenizer, full = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer("user:Hello</s>assistant:", return_tensors="pt")["input_ids"]
    options = {"return_dict_in_generate": False, "output_attentions": False, "output_hidden_states": False}
    tokens = full.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, **options)
    wanted = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert by_generate(run, model, broker).out.strip() == wanted.strip()
    assert by_chat(run, model, broker).out.strip() == wanted.strip()
    _, answer = by_batch(run, model, broker, tmp_path)
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 3),
        ("stop_strings", ["."]),
        ("max_time", 300.0),
        ("penalty_alpha", 0.6),
        ("prompt_lookup_num_tokens", 3),
        ("encoder_no_repeat_ngram_size", 2),
        ("cache_implementation", "quantized"),
        ("repetition_penalty", -1.0),
        ("temperature", "hot"),
        ("min_length", "x"),
        ("eos_token_id", [[1]]),
    ],
)
def test_every_command_refuses_what_none_can_do(
    run: Any, checkpoint: Path, broker: str, worker: None, tmp_path: Path, name: str, value: Any
) -> None:
    model = with_defaults(checkpoint, tmp_path, **{name: value})
    for done in (by_generate(run, model, broker), by_chat(run, model, broker)):
        assert done.code in (1, 2)
        loading, error = done.err.splitlines()
        assert loading.startswith("loading ")
        assert error.startswith("error: ")
        assert name in done.err or "penalty" in done.err
    done, answer = by_batch(run, model, broker, tmp_path)
    assert done.code == 1
    assert any(said in answer["error"]["message"] for said in ("generation defaults", "generation_config.json"))


def test_defaults_may_be_in_config_json(broker: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    defaults = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "max_length": 30, "eos_token_id": 13}
    path.write_text(json.dumps(json.loads(path.read_text()) | defaults))
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).generate(PROMPT)
    with joined(broker, tmp_path) as (model, _):
        assert model.generation_config.repetition_penalty == 1.8
        assert model.generate(PROMPT).tolist() == wanted.tolist()


def test_the_tokenizers_end_token_ends_an_answer(
    run: Any, checkpoint: Path, broker: str, worker: None, tmp_path: Path
) -> None:
    free = by_generate(run, checkpoint, broker).out.rstrip("\n")
    model = with_defaults(checkpoint, tmp_path, eos_token_id=0)
    (model / "tokenizer_config.json").unlink()
    own = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(own | {"eos_token": free[3]}))
    ended = free[: free.index(free[3])]
    done = run("generate", "Hello", "--max-tokens", 12, "--model", model, "--broker", broker, "--json")
    assert (done.json["text"], done.json["finish_reason"]) == (ended, "stop")
    _, answer = by_batch(run, model, broker, tmp_path)
    (choice,) = answer["response"]["body"]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ended, "stop")


# --- how long a text may be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            128,
        ),
    ],
    ids=str,
)
def test_positions_of_scaled_embeddings(rope: dict[str, Any], wanted: int) -> None:
    config = LlamaConfig(max_position_embeddings=128, rope_parameters={"rope_theta": 10000.0, **rope})
    assert max_positions(config) == wanted


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_texts_beyond_the_original_length(broker: str, tmp_path: Path, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    tiny.save("llama", tmp_path, max_position_embeddings=16, rope_parameters=rope)
    full = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.arange(3, 30)[None]
    with joined(broker, tmp_path) as (model, _):
        options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
        assert model.generate(prompt, **options).tolist() == full.generate(prompt, **options).tolist()


# --- tokens that have no embedding -------------------------------------------------------------------------


@pytest.mark.parametrize("token", [tiny.VOCABULARY, -1])
def test_a_token_without_an_embedding(
    broker: str, tmp_path: Path, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined(broker, tiny.save("llama", tmp_path)) as (model, _):
        monkeypatch.setattr(model._client, "open_session", lambda *_: pytest.fail("a session was opened"))
        for call in (model, model.generate):
            with pytest.raises(ConfigError, match=f"token {token} is not among the model's 97"):
                call(torch.tensor([[5, token, 6]]))


def test_a_tokenizer_that_was_given_more_tokens(run: Any, broker: str, tmp_path: Path) -> None:
    model = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["|one|", "|two|", "|three|", "|four|", "|five|", "|six|", "|seven|"])
    tokenizer.save_pretrained(model)
    done = run("generate", "Hello |seven|", "--model", model, "--broker", broker)
    assert done.code == 2
    assert "is not among the model's 97" in done.err
