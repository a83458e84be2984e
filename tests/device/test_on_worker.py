"""What is set, replaced or hooked on a part of a model that is on the worker is refused by name, not ignored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import AutoModelForCausalLM

import tiny
import tiny_diffusion
from fleet import joined, running_broker, split_model
from split_common.errors import UnsupportedArchitecture, UnsupportedFeature
from split_common.models.loading import read_spec
from split_device import SplitFluxTransformer2DModel, SplitModelForCausalLM, SplitUNet2DConditionModel

peft = pytest.importorskip("peft")

PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def split(broker: str, checkpoint: Path) -> Iterator[Any]:
    """Without a worker: what is refused is refused before anything is sent."""
    with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker) as model:
        yield model


def save_adapter(checkpoint: Path, directory: Path, config: Any) -> Path:
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    model.save_pretrained(directory)
    return directory


def lora(**options: Any) -> Any:
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**config | options)


# --- adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [
        lambda model, path: peft.PeftModel.from_pretrained(model, path),
        lambda model, _: peft.get_peft_model(model, lora()),
    ],
    ids=["from_pretrained", "get_peft_model"],
)
def test_a_lora_of_all_layers(split: Any, checkpoint: Path, tmp_path: Path, load: Callable[..., Any]) -> None:
    adapter = save_adapter(checkpoint, tmp_path / "lora", lora())
    with pytest.raises(UnsupportedFeature, match=r"(layers|h)\.2\."):
        load(split, adapter)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        lambda: peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    ],
    ids=["ia3", "loha", "dora", "norms"],
)
def test_other_adapters(broker: str, tmp_path: Path, config: Callable[[], Any]) -> None:
    model = tiny.save("llama", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", config())
    with (
        SplitModelForCausalLM.from_pretrained(model, broker=broker) as split,
        pytest.raises(UnsupportedFeature, match=r"layers\.2\b"),
    ):
        peft.PeftModel.from_pretrained(split, adapter)


@pytest.mark.parametrize(("arch", "target"), [("llama", "v_proj"), ("gpt2", "c_attn")])
def test_an_adapter_of_the_devices_layers(arch: str, target: str, tmp_path: Path) -> None:
    checkpoint = tiny.save(arch, tmp_path / "model")
    adapter = save_adapter(
        checkpoint, tmp_path / "lora", lora(target_modules=[target], layers_to_transform=[0, 1, 5])
    )
    full = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain = full.generate(PROMPT, **GREEDY).tolist()
    wanted = peft.PeftModel.from_pretrained(full, adapter).generate(input_ids=PROMPT, **GREEDY).tolist()
    assert wanted != plain
    with split_model(checkpoint) as split:
        adapted = peft.PeftModel.from_pretrained(split, adapter)
        assert adapted.generate(input_ids=PROMPT, **GREEDY).tolist() == wanted


def test_an_adapter_beside_the_weights(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UnsupportedArchitecture, match=r"adapter_config\.json"):
        read_spec(str(tmp_path))


# --- everything else on layers -----------------------------------------------------------------------------


def child(layer: Any) -> Any:
    return next(layer.children())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(print),
        lambda layer: layer.register_forward_pre_hook(print),
        lambda layer: layer.register_full_backward_hook(print),
        lambda layer: layer.register_parameter("gate", torch.nn.Parameter(torch.zeros(1))),
        lambda layer: layer.add_module("more", torch.nn.Identity()),
        lambda layer: setattr(layer, "forward", print),
        lambda layer: setattr(layer, "scaling", 0.5),
        lambda layer: delattr(layer, next(iter(dict(layer.named_children())))),
        lambda layer: child(layer).register_forward_hook(print),
        lambda layer: setattr(child(layer), "scaling", 0.5),
    ],
    ids=range(10),
)
def test_changes_of_layers(split: Any, change: Callable[[Any], Any]) -> None:
    slots = split.split_parts.stack.slots
    for index in (2, 3):
        with pytest.raises(UnsupportedFeature, match=rf"\.{index}\b.* on the worker"):
            change(slots[index])
    assert not list(slots[2].parameters())


def test_what_torch_does_to_all_modules_still_works(broker: str, tmp_path: Path) -> None:
    checkpoint = tiny.save("llama", tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(checkpoint).generate(PROMPT, **GREEDY).tolist()
    with joined(broker, checkpoint) as (model, _):
        assert not [name for name, _ in model.named_parameters() if "layers.2." in name or "layers.3." in name]
        model.train()
        model.eval().to("cpu").requires_grad_(False)
        model.apply(lambda _: None)
        assert "LlamaAttention" in repr(model.model.layers[3])
        assert model.generate(PROMPT, **GREEDY).tolist() == wanted


# --- denoisers ---------------------------------------------------------------------------------------------


class Half(AttnProcessor2_0):  # type: ignore[misc]
    """Attention at half its strength."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return 0.5 * super().__call__(*args, **options)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.set_attn_processor(Half()),
        lambda unet: unet.set_attn_processor({name: Half() for name in unet.attn_processors}),
        lambda unet: unet.set_attention_slice("max"),
        lambda unet: unet.fuse_qkv_projections(),
        lambda unet: unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        lambda unet: unet.down_blocks[1].register_forward_hook(print),
        lambda unet: unet.mid_block.attentions[0].register_forward_pre_hook(print),
        lambda unet: setattr(unet.up_blocks[0], "s1", 0.9),
        lambda unet: setattr(unet.down_blocks[2].resnets[0], "output_scale_factor", 2.0),
        lambda unet: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"]), unet),
    ],
    ids=["one", "dict", "slicing", "fusing", "casting", "hook", "inner hook", "freeu", "attribute", "lora"],
)
def test_changes_of_a_unet(broker: str, sdxl: Path, change: Callable[[Any], Any]) -> None:
    with (
        SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker) as unet,
        pytest.raises(UnsupportedFeature, match="on the worker"),
    ):
        change(unet)


def test_processors_that_the_worker_has(broker: str, sdxl: Path) -> None:
    with SplitUNet2DConditionModel.from_pretrained(sdxl, broker=broker) as unet:
        unet.set_attn_processor(AttnProcessor2_0())
        unet.set_default_attn_processor()
        assert not [name for name, _ in unet.named_parameters() if name.startswith("mid_block")]


def test_changes_of_a_transformer(broker: str, tmp_path: Path) -> None:
    flux = tiny_diffusion.save_flux(tmp_path)
    with SplitFluxTransformer2DModel.from_pretrained(flux, broker=broker) as transformer:
        same = next(iter(transformer.attn_processors.values()))
        transformer.set_attn_processor(same)
        with pytest.raises(UnsupportedFeature, match=r"transformer_blocks\.1\.attn.* on the worker"):
            transformer.set_attn_processor(Half())
        with pytest.raises(UnsupportedFeature, match="on the worker"):
            peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"]), transformer)
