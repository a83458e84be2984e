"""What a checkpoint's files say and are: code of its own, Git LFS pointers, links, snapshots of the hub, `~`."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
import tiny_diffusion
from split_common.errors import ModelError, UnknownModel, UnsupportedArchitecture
from split_common.models.checkpoint import Checkpoint
from split_common.models.checkpoint_files import check_pipeline_files, model_name
from split_common.models.loading import generation_config, read_spec
from split_device.generation.tokenizing import load_tokenizer
from split_device.images.settings import pipeline_directory
from split_device.jobs.job import checkpoint as job_checkpoint

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save_tokenizer(tiny.save("llama", tmp_path / "model"))


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- code of its own ---------------------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if the code in the checkpoint runs; on stdin, somebody agrees to it."""
    (model / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return tmp_path / "marker"


def test_a_checkpoint_of_an_unknown_type_does_not_run_its_code(model: Path, marker: Path) -> None:
    change(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(
        UnsupportedArchitecture, match=r"code of its own .* does not know the type 'own'"
    ) as refused:
        read_spec(str(model))
    assert "\n" not in str(refused.value)
    assert not marker.exists()


@pytest.mark.parametrize("auto_map", [["own.OwnTokenizer", None], {"AutoTokenizer": ["own.OwnTokenizer", None]}])
def test_a_tokenizer_does_not_run_its_code(model: Path, marker: Path, auto_map: Any) -> None:
    change(model / "config.json", model_type="own")
    change(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")
    with pytest.raises(UnsupportedArchitecture, match="is Python code of its own"):
        load_tokenizer(str(model))
    assert not marker.exists()


def test_settings_of_a_tokenizer_that_no_text_can_use_are_refused_when_it_is_loaded(model: Path) -> None:
    change(model / "tokenizer_config.json", model_max_length="long")
    with pytest.raises(UnknownModel, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(str(model))


def test_a_known_type_is_loaded_without_the_code_that_comes_with_it(model: Path, marker: Path) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(model / "config.json", auto_map=auto_map)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    assert read_spec(str(model)).model_class.__module__.startswith("transformers.models.llama")
    assert load_tokenizer(str(model))("Hi")["input_ids"]
    assert not marker.exists()


@pytest.mark.parametrize("auto_map", [5, [], "own.OwnConfig", {"AutoConfig": 7}])
def test_a_malformed_auto_map_is_no_surprise(model: Path, auto_map: Any) -> None:
    change(model / "config.json", model_type="own", auto_map=auto_map)
    with pytest.raises(ModelError):
        read_spec(str(model))


# --- files that are not there ------------------------------------------------------------------------------


def digest(checkpoint: Checkpoint) -> None:
    checkpoint.digest(checkpoint.tensor_names)


def load(model: Path) -> None:
    spec = read_spec(str(model))
    digest(spec.checkpoint)
    generation_config(spec.checkpoint)
    load_tokenizer(str(model))


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "adapter_config.json",
    ],
)
def test_git_lfs_pointers_are_refused_by_name(model: Path, file: str) -> None:
    (model / file).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{file} is a Git LFS pointer, .*: run `git lfs pull`"):
        load(model)


def test_pointers_in_place_of_an_index_or_a_shard(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", max_shard_size="20KB")
    shard = min(model.glob("model-*.safetensors"))
    for path in (shard, model / "model.safetensors.index.json"):
        path.write_text(POINTER)
        with pytest.raises(ModelError, match=f"{path.name} is a Git LFS pointer"):
            digest(Checkpoint.resolve(model))


def test_pointers_that_nothing_reads_do_no_harm(model: Path) -> None:
    for name in ("tokenizer.model", "pytorch_model.bin", "model.fp16.safetensors", "onnx.onnx"):
        (model / name).write_text(POINTER)
    load(model)


def test_pointers_in_a_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_diffusion.save_sdxl(tmp_path / "sdxl")
    check_pipeline_files(pipeline)
    (pipeline / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_text(POINTER)
    check_pipeline_files(pipeline)
    files = [path for path in pipeline.glob("*/*") if path.suffix in (".json", ".txt", ".safetensors")]
    for path in [file for file in files if "fp16" not in file.name]:
        kept = path.read_bytes()
        path.write_text(POINTER)
        with pytest.raises(ModelError, match="is a Git LFS pointer"):
            check_pipeline_files(pipeline)
        path.write_bytes(kept)
    (pipeline / "model_index.json").write_text(POINTER)
    with pytest.raises(ModelError, match=r"model_index\.json is a Git LFS pointer"):
        Checkpoint.resolve(pipeline)


def test_defaults_that_are_nested_too_deeply_are_named(model: Path) -> None:
    (model / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"generation_config\.json: maximum recursion"):
        generation_config(Checkpoint.resolve(str(model)))


@pytest.mark.parametrize(
    ("field", "said"),
    [("watermarking_config", "has no attribute"), ("forced_eos_token_id", "forced_eos_token_id is")],
)
def test_defaults_of_other_types_are_named(model: Path, field: str, said: str) -> None:
    change(model / "generation_config.json", **{field: True})
    with pytest.raises(ModelError, match=rf"generation_config\.json: .*{said}"):
        generation_config(Checkpoint.resolve(str(model)))


def test_what_is_no_file_is_named(model: Path) -> None:
    (model / "generation_config.json").unlink()
    os.mkfifo(model / "generation_config.json")
    with pytest.raises(ModelError, match=r"generation_config\.json is not a file"):
        generation_config(Checkpoint.resolve(str(model)))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors is not a file"):
        read_spec(str(model))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", "vocab.json"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is not a file"),
        (os.mkdir, "is not a file"),
        (lambda path: path.symlink_to("gone"), "is a link to gone, which does not exist"),
    ],
    ids=["pipe", "directory", "link"],
)
def test_what_a_tokenizer_cannot_read_is_named(
    model: Path, file: str, make: Callable[[Path], None], said: str
) -> None:
    """transformers leaves it out without a word, and the text becomes other tokens."""
    (model / file).unlink(missing_ok=True)
    make(model / file)
    with pytest.raises(ModelError, match=rf"{file} {said}"):
        load_tokenizer(str(model))


def test_a_link_that_leads_nowhere_is_named(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(ModelError, match=r"model\.safetensors is a link to .*blobs/gone, which does not exist"):
        Checkpoint.resolve(model)


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--some-org--small-model", "some-org/small-model"),
        ("models--gpt2", "gpt2"),
        ("models--org--a--b", "org/a--b"),
    ],
)
def test_a_snapshot_of_the_hub_has_the_name_of_its_model(model: Path, folder: str, name: str) -> None:
    snapshot = model.parent / folder / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    (model.parent / "link").symlink_to(snapshot)
    for path in (snapshot, model.parent / "link"):
        assert Checkpoint.resolve(path).name == model_name(str(path)) == name


@pytest.mark.parametrize("path", ["model", "snapshots/model", "a/snapshots/model", "models--a--b/model"])
def test_other_directories_have_their_own_names(tmp_path: Path, path: str) -> None:
    (tmp_path / path).mkdir(parents=True)
    assert model_name(str(tmp_path / path)) == "model"
    assert model_name("some-org/small-model") == "some-org/small-model"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "home"


def test_a_tilde_is_the_home_directory_for_every_reader(model: Path, home: Path) -> None:
    shutil.copytree(model, home / "m")
    shutil.copytree(tiny_diffusion.save_sdxl(model.parent / "sdxl"), home / "p")
    assert Checkpoint.resolve("~/m").name == model_name("~/m") == "m"
    assert load_tokenizer("~/m")("Hi")["input_ids"]
    assert job_checkpoint("~/m") == str((home / "m").resolve())
    assert pipeline_directory("~/p") == str((home / "p").resolve())
    with pytest.raises(UnknownModel, match="'~nobody-of-this-name/m' is neither a directory"):
        Checkpoint.resolve("~nobody-of-this-name/m")


@pytest.mark.parametrize("command", [("keys", "init", "--keys=~/a/fleet"), ("redis-acl", "--passwords=~/a/b")])
def test_options_and_variables_take_a_tilde(
    command: tuple[str, ...], home: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_KEYS", "~/fleet")
    assert run("keys", "init").code == 0
    assert run(*command).code == 0
    assert {path.name for path in home.iterdir()} == {"a", "fleet"}
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ("redis-acl", "--passwords", ""),
        ("keys", "init", "--keys="),
        ("batch", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_directory(
    command: tuple[str, ...], run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*command)
    assert done.code == 2
    assert "the path is empty" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("generate", "Hi", "--model="), ("inspect", " "), ("worker", "--model", "")])
def test_an_empty_model_is_not_the_current_directory(
    command: tuple[str, ...], model: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    done = run(*command)
    assert done.code == 2
    assert "name is empty" in done.err
