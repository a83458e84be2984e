"""Quantized checkpoints: the tokens of the same model unsplit, from each side's own tensors."""

from __future__ import annotations

import json
import re
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from benchmarks.quantized import quantize
from fleet import KV_BYTES, split_model
from split_common.errors import ModelError, TensorMismatch, UnsupportedArchitecture
from split_common.models.checkpoint import Checkpoint
from split_common.models.loading import generation_config, load_part, read_spec
from split_common.models.quantization import stored_bytes
from split_common.models.split import Split
from split_common.models.verification import build_manifest
from split_common.models.weights import Side
from split_device.cli.doctor_model import model_findings
from split_worker.bodies.loading import load_language_body

SPLIT = Split.from_head_tail(tiny.LAYERS, 2, 2)
#: What each form is made of, if not a Llama.
_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mxfp4": ("gpt_oss", {"intermediate_size": 64}),
    "fp8": ("deepseek_v3", {}),
}
_PACKAGES = {
    "w4a16": "compressed_tensors",
    "w8a8_fp8": "compressed_tensors",
    "bnb_nf4": "bitsandbytes",
    "torchao_int8": "torchao",
    "torchao_int8_rounding": "torchao",
}
FORMS = (
    "mxfp4",
    pytest.param("fp8", marks=pytest.mark.long),
    "w4a16",
    pytest.param("w8a8_fp8", marks=pytest.mark.long),
    pytest.param("bnb_nf4", marks=pytest.mark.long),
    "torchao_int8",
    "gguf",
)


def make(form: str, directory: Path) -> Path:
    """A tiny checkpoint in a quantized form; skips the test if the form's package is not installed."""
    if form in _PACKAGES and find_spec(_PACKAGES[form]) is None:
        pytest.skip(f"{_PACKAGES[form]} is not installed: pip install 'lambda-split[quantization]'")
    arch, changes = _BASES.get(form, ("llama", {"hidden_size": 64, "intermediate_size": 64}))
    return quantize(form, tiny.save(arch, directory / "float", **changes), directory / form)


def unsplit(checkpoint: Path) -> Any:
    """The same quantized model in one process, its weights dequantized if they are split."""
    if checkpoint.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(checkpoint.parent, gguf_file=checkpoint.name)
    config = json.loads((checkpoint / "config.json").read_text())
    if config["quantization_config"]["quant_method"] not in ("bitsandbytes", "torchao"):
        config["quantization_config"]["dequantize"] = True
        (checkpoint / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_the_unsplit_model(form: str, tmp_path: Path) -> None:
    checkpoint = make(form, tmp_path)
    prompts = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False}
    with split_model(checkpoint) as model:
        split = [model.generate(prompts, attention_mask=mask, num_beams=beams, **options) for beams in (1, 3)]
        logits = model(prompts[:1]).logits
    whole = unsplit(checkpoint)
    for beams, tokens in zip((1, 3), split, strict=True):
        assert torch.equal(tokens, whole.generate(prompts, attention_mask=mask, num_beams=beams, **options))
    assert (logits - whole(prompts[:1]).logits).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["mxfp4", "fp8", "w4a16"])
def test_a_side_needs_none_of_the_other_sides_tensors(form: str, tmp_path: Path) -> None:
    checkpoint = make(form, tmp_path)
    everything = load_file(file := checkpoint / "model.safetensors")
    sides: tuple[Side, ...] = ("device", "worker")
    spec = read_spec(str(checkpoint))
    own = {side: spec.own_tensors(SPLIT, side) for side in sides}
    assert sorted(own["device"] + own["worker"]) == sorted(everything)
    for side in sides:
        save_file({name: everything[name] for name in own[side]}, file, metadata={"format": "pt"})
        model, _ = load_part(read_spec(str(checkpoint)), SPLIT, side)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_side_reads_its_own_part_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make("gguf", tmp_path)
    spec = read_spec(str(file))
    expected = unsplit(file)
    read: list[int] = []

    def dequantize(data: Any, kind: Any) -> Any:
        read.append(data.nbytes)
        return gguf.quants.dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", dequantize)
    sides: tuple[Side, ...] = ("device", "worker")
    for side in sides:
        model, _ = load_part(spec, SPLIT, side, dtype=torch.bfloat16)
        assert sum(read) == spec.checkpoint.nbytes(spec.own_tensors(SPLIT, side))
        read.clear()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(name).bfloat16())


def test_the_manifest_covers_the_metadata_of_a_gguf_file(tmp_path: Path) -> None:
    file = make("gguf", tmp_path)
    before = build_manifest(Checkpoint.resolve(file))
    assert before.name == "model-Q8_0"
    content = file.read_bytes()
    # The base of the rotary embedding, 10000.
    file.write_bytes(content.replace(struct.pack("<f", 10000.0), struct.pack("<f", 20000.0), 1))
    after = build_manifest(Checkpoint.resolve(file))
    assert after.tensors == before.tensors
    assert after.config != before.config


def test_gguf_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make("gguf", tmp_path)
    content = file.read_bytes()
    for malformed in (content[:100], content[:-1000], b"GGUF" + bytes(64), b"text"):
        file.write_bytes(malformed)
        with pytest.raises(ModelError, match=r"model-Q8_0\.gguf is not a GGUF file, or a malformed one"):
            Checkpoint.resolve(file)
    file.write_bytes(content)
    monkeypatch.setattr("split_common.models.gguf_header.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install 'lambda-split\[gguf\]'"):
        Checkpoint.resolve(file)


def test_the_defaults_of_a_gguf_file_are_its_own(tmp_path: Path) -> None:
    file = make("gguf", tmp_path)
    (file.parent / "generation_config.json").write_text(json.dumps({"max_new_tokens": 1}))
    assert generation_config(Checkpoint.resolve(file)).max_new_tokens is None


def test_a_worker_says_what_its_weights_run_as(tmp_path: Path) -> None:
    checkpoint = make("w4a16", tmp_path)
    spec = read_spec(str(checkpoint))
    lines = load_language_body(spec, SPLIT, torch.device("cpu"), kv_bytes=KV_BYTES).describe("2:4")
    stored = spec.checkpoint.nbytes(spec.own_tensors(SPLIT, "worker"))
    assert f"{stored:,} bytes of weights in compressed-tensors are dequantized to float32" in lines


@pytest.mark.parametrize("form", ["mxfp4", "torchao_int8"])
def test_inspect_shows_what_is_stored_and_what_it_runs_as(form: str, run: Any, tmp_path: Path) -> None:
    checkpoint = make(form, tmp_path)
    shown = run("inspect", checkpoint, "--json").json
    body = next(part for part in shown["parts"] if part["name"] == "body")
    model, _ = load_part(read_spec(str(checkpoint)), SPLIT, "worker")
    stored = sum(tensor.nbytes for tensor in load_file(checkpoint / "model.safetensors").values())
    if form == "mxfp4":
        assert shown["quantization"] == {"method": "mxfp4", "stored_bytes": stored, "dequantized_to": "float32"}
        assert f"{stored:,} bytes of weights in mxfp4 are dequantized to float32" in run("inspect", checkpoint).out
        (found,) = (each.detail for each in model_findings(str(checkpoint)) if each.subject == "weights")
        assert found == f"{stored:,} bytes of weights in mxfp4 are dequantized to float32"
    else:
        assert shown["quantization"]["dequantized_to"] is None
        assert "bytes of weights in torchao run as they are stored" in run("inspect", checkpoint).out
    assert body["bytes"] == sum(map(stored_bytes, model.parameters()))


def test_the_manifest_covers_tensors_as_they_are_stored(tmp_path: Path) -> None:
    checkpoint = make("fp8", tmp_path)
    manifest = build_manifest(Checkpoint.resolve(checkpoint))
    tensors = load_file(file := checkpoint / "model.safetensors")
    changed = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[changed] = tensors[changed] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TensorMismatch, match=changed):
        manifest.check(Checkpoint.resolve(checkpoint).digest([changed]))


def test_the_manifest_covers_how_torchao_puts_tensors_together(tmp_path: Path) -> None:
    checkpoint = make("torchao_int8", tmp_path)
    file = checkpoint / "model.safetensors"
    manifest = build_manifest(Checkpoint.resolve(checkpoint))
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    changed = "model.layers.2.mlp.up_proj.weight"
    metadata[changed] = metadata[changed].replace("[1, 64]", "[1, 32]")
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(TensorMismatch, match=r"model\.layers\.2\.mlp\.up_proj\._weight_"):
        manifest.check((found := Checkpoint.resolve(checkpoint)).digest(found.tensor_names))
    metadata[changed] = metadata[changed].replace("Int8Tensor", "Tensor8")
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(ModelError, match=rf"{re.escape(changed)} cannot be put together"):
        load_part(read_spec(str(checkpoint)), SPLIT, "worker")


def test_torchao_that_rounds_activations_is_refused(tmp_path: Path) -> None:
    checkpoint = make("torchao_int8_rounding", tmp_path)
    with pytest.raises(UnsupportedArchitecture, match="torchao would round the inputs of model"):
        load_part(read_spec(str(checkpoint)), SPLIT, "worker")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "weights quantized by bitsandbytes_8bit do not run split",
        ),
        ({"quant_method": "gptq", "bits": 4}, r"is quantized \(gptq\): .*install"),
        ({"quant_method": "awq", "bits": 4}, r"is quantized \(awq\): .*install"),
        ({"quant_method": "made-up"}, "is quantized by 'made-up', which transformers does not know"),
        ({"bits": 4}, "is quantized by None, which transformers does not know"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = json.loads((tiny.save("llama", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(UnsupportedArchitecture, match=reason):
        read_spec(str(tmp_path))


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((tiny.save("llama", tmp_path) / "config.json").read_text())
    settings = {"quant_method": "compressed-tensors", "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    monkeypatch.setattr("split_common.models.quantization.find_spec", lambda _: None)
    with pytest.raises(UnsupportedArchitecture, match=r"pip install 'lambda-split\[quantization\]'"):
        read_spec(str(tmp_path))
