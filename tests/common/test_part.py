"""Loading one side: only its own tensors, of the shards that hold them; and what is found out about the slots."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_vision
from fleet import joined, running_broker, start_worker
from split_common.errors import (
    MissingTensor,
    ModelError,
    NoWorker,
    TensorMismatch,
    UnsupportedArchitecture,
)
from split_common.models import checkpoint as checkpoint_module
from split_common.models.layer_stack import LayerStack, PassThrough
from split_common.models.loading import load_part, read_spec, strip
from split_common.models.split import Split
from split_common.models.verification import build_manifest, find_manifest
from split_common.models.weights import Side
from split_common.trust.fleet import Fleet
from split_device import SplitModelForCausalLM

SPLIT = Split.from_head_tail(tiny.LAYERS, 2, 2)
SIDES: tuple[Side, ...] = ("device", "worker")


def rewrite(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """Changes a checkpoint's tensors, or drops those for which `change` gives None."""
    file = directory / "model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    kept = {name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})
    return directory


def dropping(part: str) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    return lambda name, tensor: None if part in name else tensor


# --- which tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", tiny.LISTED)
def test_sides_share_no_tensor_and_lack_none(arch: str, tmp_path: Path) -> None:
    spec = read_spec(str(tiny.save(arch, tmp_path)))
    device, worker = (spec.own_tensors(SPLIT, side) for side in SIDES)
    assert sorted(device + worker) == spec.checkpoint.tensor_names
    assert {spec.layer_of(name) for name in worker} == {2, 3}
    assert {spec.layer_of(name) for name in device} == {None, 0, 1, 4, 5}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_parameters_of_a_part(arch: str, tmp_path: Path) -> None:
    """Each side has the unsplit model's weights in its own layers, and no parameter in the other's."""
    full = LayerStack(tiny.build(arch), tiny.LAYERS)
    spec = read_spec(str(tiny.save(arch, tmp_path)))
    for side in SIDES:
        model, stack = load_part(spec, SPLIT, side)
        for index, (slot, layer) in enumerate(zip(stack.slots, full.slots, strict=True)):
            if (index in SPLIT.body) == (side == "worker"):
                assert slot.state_dict().keys() == layer.state_dict().keys()
                assert all(torch.equal(slot.state_dict()[name], t) for name, t in layer.state_dict().items())
            else:
                assert isinstance(slot, PassThrough)
                assert not list(slot.parameters())
        beside = [name for name, _ in model.named_parameters() if f".{stack.attribute}." not in name]
        assert bool(beside) == (side == "device")
        assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


def test_bare_parameters_beside_the_stack_are_the_device_s(tmp_path: Path) -> None:
    """Neither asked for nor kept by a worker: code around the layers uses them in some calls only."""
    tiny.save("llama", tmp_path)
    spec = read_spec(str(tmp_path))

    class WithMark(spec.model_class):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.mark = torch.nn.Parameter(torch.zeros(3))

    spec.model_class = WithMark
    model, _ = load_part(spec, SPLIT, "worker")
    assert not list(model.model.named_parameters(recurse=False))
    assert model.model.mark.shape == (3,)
    with pytest.raises(MissingTensor, match=r"model\.mark"):
        load_part(spec, SPLIT, "device")


def test_bare_parameters_that_layers_are_handed(tmp_path: Path) -> None:
    def forward(self: Any, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, scale=self.mark)
        return (hidden,)

    model = Editor(forward).model
    model.model.mark = torch.nn.Parameter(torch.zeros(3))
    LayerStack(model, tiny.LAYERS)
    strip(model, model.model.layers)
    with pytest.raises(UnsupportedArchitecture, match=r"hands layer 0 `scale`, which depends on .* weights beside"):
        LayerStack(model, tiny.LAYERS)


def test_tensors_beyond_the_last_layer_are_left_out(tmp_path: Path) -> None:
    """Some checkpoints carry another layer, which predicts further tokens."""
    extra = {"model.layers.6.mlp.up_proj.weight": torch.zeros(48, 32)}
    file = tiny.save("llama", tmp_path) / "model.safetensors"
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    spec = read_spec(str(tmp_path))
    assert all("layers.6" not in name for side in SIDES for name in spec.own_tensors(SPLIT, side))
    for side in SIDES:
        load_part(spec, SPLIT, side)


def test_checkpoint_with_names_of_its_own(tmp_path: Path) -> None:
    """The stack's name in a checkpoint need not be the model's; it is the one stack of as many layers."""
    tiny.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {re.sub(r"model\.layers\.", "transformer.h.", name): t for name, t in load_file(file).items()}
    renamed["transformer.h.0.mlp.experts.0.bias"] = torch.zeros(1)
    save_file(renamed, file, metadata={"format": "pt"})
    spec = read_spec(str(tmp_path))
    assert spec.prefix == "transformer.h"
    assert {spec.layer_of(name) for name in spec.own_tensors(SPLIT, "worker")} == {2, 3}


def test_checkpoint_with_another_stack(tmp_path: Path) -> None:
    """Of several stacks, the one whose tensors become those of the decoder."""
    file = tiny.save("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    vision = {f"vision.layers.{index}.weight": torch.zeros(1) for index in range(tiny.LAYERS)}
    save_file({**tensors, **vision}, file, metadata={"format": "pt"})
    assert read_spec(str(tmp_path)).prefix == "model.layers"


def test_checkpoint_with_two_stacks_that_may_be_the_decoders(tmp_path: Path) -> None:
    file = tiny.save("llama", tmp_path) / "model.safetensors"
    strange = {name.replace("model.layers", "one.layers"): tensor for name, tensor in load_file(file).items()}
    other = {f"two.layers.{index}.weight": torch.zeros(1) for index in range(tiny.LAYERS)}
    save_file({**strange, **other}, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedArchitecture, match=r"several stacks of layers \(one.layers, two.layers\)"):
        read_spec(str(tmp_path))


@pytest.mark.parametrize("kind", ["gemma3", "llava_deep", "qwen3_vl"])
def test_a_worker_loads_the_decoders_layers_alone(kind: str, tmp_path: Path) -> None:
    """Tower and projector of a model that sees images are the device's."""
    spec = read_spec(str(tiny_vision.save(kind, tmp_path)))
    device, worker = (spec.own_tensors(SPLIT, side) for side in SIDES)
    assert {spec.layer_of(name) for name in worker} == {2, 3}
    assert not [name for name in worker if "vision" in name or "visual" in name]
    assert [name for name in device if "vision" in name or "visual" in name]
    part, stack = load_part(spec, SPLIT, "worker")
    layers = {id(parameter) for index in (2, 3) for parameter in stack.slots[index].parameters()}
    assert {id(parameter) for parameter in part.parameters()} == layers


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_only_the_shards_needed_are_fetched(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a hub: each side downloads and hashes the shards with its own tensors."""
    source = tiny.save(arch, tmp_path / "source", max_shard_size=12_000)
    assert len(list(source.glob("*.safetensors"))) > 6
    fetched: set[str] = set()

    def hub(repo: str, revision: str | None) -> Callable[[str], Path]:
        def fetch(file: str) -> Path:
            if not (source / file).exists():
                raise FileNotFoundError(file)
            fetched.add(file)
            return source / file

        return fetch

    fleet = Fleet.create(tmp_path / "fleet")
    fleet.add_manifest(build_manifest(checkpoint_module.Checkpoint.resolve(source), "org/model"))
    monkeypatch.setattr(checkpoint_module, "hub_files", hub)
    shards: dict[Side, set[str]] = {}
    for side in SIDES:
        fetched.clear()
        spec = read_spec("org/model")
        own = spec.own_tensors(SPLIT, side)
        find_manifest(fleet, spec.checkpoint, own)
        load_part(spec, SPLIT, side)
        shards[side] = {file for file in fetched if file.endswith(".safetensors")}
        assert shards[side] == {spec.checkpoint.files[name] for name in own}
    assert shards["device"] - shards["worker"]
    assert shards["worker"] - shards["device"]


def test_sharded_checkpoint_gives_the_same_tokens(tmp_path: Path) -> None:
    prompt = torch.tensor([[5, 17, 33]])
    tiny.save("llama", tmp_path, max_shard_size=12_000)
    with running_broker() as broker, joined(broker.address, tmp_path) as (model, _):
        ours = model.generate(prompt, do_sample=False, max_new_tokens=8)
    assert ours.tolist() == tiny.build("llama").generate(prompt, do_sample=False, max_new_tokens=8).tolist()


# --- what is wrong with a checkpoint -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "side"),
    [
        ("model.layers.3.mlp.up_proj.weight", "worker"),
        ("model.layers.2.", "worker"),
        ("model.layers.0.self_attn.q_proj.weight", "device"),
        ("model.layers.5.", "device"),
        ("model.embed_tokens.weight", "device"),
        ("lm_head.weight", "device"),
    ],
)
def test_missing_tensor(part: str, side: Side, tmp_path: Path) -> None:
    """The side that needs it says so; the other one does not care."""
    spec = read_spec(str(rewrite(tiny.save("llama", tmp_path), dropping(part))))
    with pytest.raises(MissingTensor, match=re.escape(part)):
        load_part(spec, SPLIT, side)
    load_part(spec, SPLIT, "device" if side == "worker" else "worker")


def test_missing_tensor_from_end_to_end(tmp_path: Path) -> None:
    body = rewrite(tiny.save("llama", tmp_path / "body"), dropping("layers.3.mlp.up_proj"))
    head = rewrite(tiny.save("llama", tmp_path / "head"), dropping("layers.0.mlp.up_proj"))
    with running_broker() as broker:
        with pytest.raises(MissingTensor, match=r"layers\.3\.mlp\.up_proj"):
            start_worker(body, broker.address)
        with pytest.raises(MissingTensor, match=r"layers\.0\.mlp\.up_proj"):
            SplitModelForCausalLM.from_pretrained(head, broker=broker.address)


@pytest.mark.parametrize(
    ("arch", "part"), [("mixtral", "layers.3.block_sparse_moe.experts.1.w2"), ("qwen3_moe", "3.mlp.experts.2.up")]
)
def test_missing_tensor_of_those_that_are_merged(arch: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has the shape|do not make the model"):
        load_part(read_spec(str(rewrite(tiny.save(arch, tmp_path), dropping(part)))), SPLIT, "worker")


def test_tensor_of_another_shape(tmp_path: Path) -> None:
    def shorten(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:-1] if "layers.3.mlp.up_proj" in name else tensor

    spec = read_spec(str(rewrite(tiny.save("llama", tmp_path), shorten)))
    with pytest.raises(ModelError, match=r"layers.3.mlp.up_proj.weight has the shape \[47, 32\], not \[48, 32\]"):
        load_part(spec, SPLIT, "worker")


def nudged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1e-3 if "layers.0.mlp.up_proj" in name else tensor


def test_tensor_that_does_not_match_the_manifest(tmp_path: Path) -> None:
    """Found out when the part is loaded, before the queue is joined."""
    fleet = Fleet.create(tmp_path / "fleet")
    directory = tiny.save("llama", tmp_path / "model")
    fleet.add_manifest(build_manifest(checkpoint_module.Checkpoint.resolve(directory)))
    rewrite(directory, nudged)
    with pytest.raises(TensorMismatch, match=r"layers\.0\.mlp\.up_proj"):
        SplitModelForCausalLM.from_pretrained(directory, broker="tcp://127.0.0.1:1", keys=fleet.path)


def test_sides_of_different_weights_do_not_meet(tmp_path: Path) -> None:
    original = tiny.save("llama", tmp_path / "one")
    changed = rewrite(tiny.save("llama", tmp_path / "two"), nudged)
    with running_broker() as broker:
        worker = start_worker(original, broker.address)
        try:
            model = SplitModelForCausalLM.from_pretrained(changed, broker=broker.address, patience=1)
            with model, pytest.raises(NoWorker, match="with these weights"):
                model.generate(torch.tensor([[5, 6]]), max_new_tokens=1)
        finally:
            worker.stop()


# --- slots -------------------------------------------------------------------------------------------------


class Editor:
    """A tiny Llama whose stack's owner calls its layers in a manner of its own."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.model = tiny.build("llama")
        owner = self.model.model
        owner.__class__ = type("Odd", (type(owner),), {"forward": forward})


def plain(self: Any, inputs_embeds: torch.Tensor, position_ids: Any = None, **_: Any) -> Any:
    hidden = inputs_embeds
    for layer in self.layers:
        hidden = layer(hidden)
    return (hidden,)


def backwards(self: Any, inputs_embeds: torch.Tensor, **_: Any) -> Any:
    hidden = inputs_embeds
    for layer in reversed(self.layers):
        hidden = layer(hidden)
    return (hidden,)


def twice(self: Any, inputs_embeds: torch.Tensor, **_: Any) -> Any:
    hidden = inputs_embeds
    for layer in [*self.layers, self.layers[-1]]:
        hidden = layer(hidden)
    return (hidden,)


def beside(self: Any, inputs_embeds: torch.Tensor, **_: Any) -> Any:
    hidden = inputs_embeds
    for layer in self.layers:
        hidden = layer(hidden, extra={"of the text": [inputs_embeds * 2]})
    return (hidden,)


def four(self: Any, inputs_embeds: torch.Tensor, **_: Any) -> Any:
    hidden = inputs_embeds[None]
    for layer in self.layers:
        hidden = layer(hidden)
    return (hidden[0],)


def furthest(self: Any, inputs_embeds: torch.Tensor, position_ids: Any = None, **_: Any) -> Any:
    hidden = inputs_embeds
    for layer in self.layers:
        hidden = layer(hidden, scale=0 if position_ids is None else position_ids.max() * torch.ones(1, 3))
    return (hidden,)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (backwards, r"called in the order \[5, 4, 3, 2, 1, 0\]"),
        (twice, r"called in the order \[0, 1, 2, 3, 4, 5, 5\]"),
        (beside, "hands layer 0 `extra`, which depends on the text"),
        (four, r"not handed one tensor \[batch, tokens, hidden\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stack_that_cannot_be_cut(forward: Callable[..., Any], reason: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=reason):
        LayerStack(Editor(forward).model, tiny.LAYERS)


@pytest.mark.parametrize(("forward", "interact"), [(plain, False), (furthest, True)])
def test_positions_that_interact(forward: Callable[..., Any], interact: bool) -> None:
    assert LayerStack(Editor(forward).model, tiny.LAYERS).positions_interact == interact


@pytest.mark.parametrize(
    ("arch", "returns_tuple", "takes_positions"),
    [("llama", False, True), ("bloom", True, False), ("opt", False, True)],
)
def test_traits_of_a_stack(arch: str, returns_tuple: bool, takes_positions: bool) -> None:
    stack = LayerStack(tiny.build(arch), tiny.LAYERS)
    assert (stack.returns_tuple, stack.takes_positions) == (returns_tuple, takes_positions)
    assert stack.positions_interact is False
    assert stack.width == 32


def test_stack_is_left_as_it_was() -> None:
    model = tiny.build("llama")
    before = list(model.model.layers)
    LayerStack(model, tiny.LAYERS)
    assert all(one is other for one, other in zip(model.model.layers, before, strict=True))


def test_pass_through_has_the_settings_of_its_layer(tmp_path: Path) -> None:
    """Code around the layers reads them, e.g. to choose a mask."""
    layer = torch.nn.Linear(2, 3)
    layer.attention_type = "full"  # type: ignore[assignment]
    slot = PassThrough()
    slot.imitate(layer)
    assert (slot.attention_type, slot.in_features) == ("full", 2)
    assert not list(slot.parameters())


@pytest.mark.parametrize("layers", [0, 5, 7])
def test_model_without_a_stack_of_that_many_layers(layers: int) -> None:
    with pytest.raises(UnsupportedArchitecture, match=f"no stack of {layers} layers"):
        LayerStack(tiny.build("llama"), layers)
