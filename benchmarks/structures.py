"""Tiny random checkpoints with the structure of any language model type that transformers knows.

A structure is what the type's own default configuration describes, with every size made small: 8 layers of width
32, windows and chunks of 8 tokens, 4 experts, towers of 2 layers. Kinds of layers take turns, so that a cut after 2
layers and before the last 2 leaves each of them in the body.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto import modeling_auto

from benchmarks.structure_sizes import (
    COMPOSITE,
    DERIVED,
    EXCEPTIONS,
    LAYERS,
    OPEN,
    OWN_PATTERN,
    TEXT,
    TEXT_PARTS,
    TOWER,
    VOCABULARY,
)

#: A prompt `[1, tokens]`, int64, of tokens that mean nothing special to any structure.
PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80, 7, 29]])
#: Ids from here on stand for images, sounds and the like: a test must not let the model generate one.
FIRST_SPECIAL = 80 + 6
SPECIAL = (0, *range(FIRST_SPECIAL, VOCABULARY))
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
_TOKEN_NAME = re.compile(r".*(_token_id|_token_index|_token|_token_id_\w+)")
#: Standard deviations of weights, and of embeddings: the first that lets a model say different things is taken.
_DEVIATIONS = ((0.25, 0.25), (0.1, 1.0), (0.05, 1.0), (0.5, 0.5))


def causal_types() -> list[str]:
    """The model types of `AutoModelForCausalLM`."""
    return list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_text_types() -> list[str]:
    """The model types of `AutoModelForImageTextToText`, some of which are causal types as well."""
    return list(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def auto_class(model_type: str, images: bool | None = None) -> Any:
    """The class by which transformers loads a type.

    Args:
        images: whether the class that sees images is meant; None takes it where there is no other.
    """
    if images is None:
        images = model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The small configuration of a type.

    Args:
        changes: values that differ; a mapping changes a part of the configuration, like `text_config`.
    """
    config_class = CONFIG_MAPPING[model_type]
    sizes = _Shrinking().shrink(config_class())
    _merge(sizes, changes)
    sizes.pop("model_type", None)
    config: PreTrainedConfig = config_class(**sizes)
    if "layer_types" not in changes and "layer_types" not in changes.get("text_config", {}):
        _take_turns(config)
    return config


def build(config: PreTrainedConfig, images: bool | None = None) -> Any:
    """The model of a configuration: on the CPU, in fp32, the same weights every time.

    Weights are larger than a new model's, so that neither layers nor logits are near to zero.
    """
    auto = auto_class(config.model_type, images)
    best: tuple[int, Any] | None = None
    for weights, embeddings in _DEVIATIONS:
        model = _filled(auto, config, weights, embeddings)
        distinct = _distinct_tokens(model)
        if best is None or distinct > best[0]:
            best = distinct, model
        if distinct >= 4 or distinct == 0:
            break
    assert best is not None
    return best[1]


def save(model_type: str, directory: Path, images: bool | None = None, **changes: Any) -> Path:
    """Saves the model of a type as a checkpoint in `directory`, in safetensors; the arguments are those above."""
    build(tiny_config(model_type, **changes), images).save_pretrained(directory)
    return directory


class _Shrinking:
    """Makes one configuration small. The parts of a configuration agree about ids of tokens."""

    def __init__(self) -> None:
        self._tokens = dict(_TOKENS)

    def shrink(self, config: PreTrainedConfig, text: bool = True) -> dict[str, Any]:
        """The small values of a configuration, or of a part of it; `text` says whether it describes a decoder."""
        parts = {name: part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
        composite = text and any(name in TEXT_PARTS for name in parts)
        sizes = (COMPOSITE if composite else TEXT) if text else TOWER
        small: dict[str, Any] = {}
        for name, value in config.to_dict().items():
            if name in parts:
                small[name] = self.shrink(parts[name], text and (not composite or name in TEXT_PARTS))
            elif name not in DERIVED and not name.startswith("_"):
                small[name] = self._value(name, value, sizes, config)
        if "kv_lora_rank" in small:  # such attention has as many keys as queries
            small["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
        if text and not composite and _has_sections(config):
            _merge(small, {"rope_parameters": {"mrope_section": _sections(small)}})
        _merge(small, EXCEPTIONS.get(config.model_type, {}))
        return small

    def _value(self, name: str, value: Any, sizes: Mapping[str, Any], config: PreTrainedConfig) -> Any:
        if isinstance(value, bool) or value == 0:
            return value
        if value is None and sizes is TEXT:
            return OPEN.get(name)
        if isinstance(value, int) and name in sizes:
            return sizes[name]
        if isinstance(value, list | tuple) and name in sizes and len(value) > LAYERS:
            return [sizes[name]] * LAYERS
        if _TOKEN_NAME.fullmatch(name) and isinstance(value, int | list | tuple):
            return self._tokens.setdefault(name, VOCABULARY - 1 - len(self._tokens) + len(_TOKENS))
        if name == "image_size" and isinstance(value, int | list | tuple):
            return _image_size(value, getattr(config, "patch_size", None) or 14)
        if name == "rope_parameters" and isinstance(value, dict):
            return _rope(value)
        return value


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Changes values, those of inner dictionaries one by one; `...` removes a value."""
    for name, value in changes.items():
        if value is ...:
            values.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = copy.deepcopy(value)


def _image_size(value: Any, patch: Any) -> Any:
    """A picture of 4 by 4 patches."""
    side = 4 * (patch[0] if isinstance(patch, list | tuple) else patch)
    return side if isinstance(value, int) else [side] * len(value)


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    small = {name: _rope(part) if isinstance(part, dict) else part for name, part in value.items()}
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = 64
    return small


def _has_sections(config: PreTrainedConfig) -> bool:
    """Whether positions have three axes: the type's code then has default sections, for heads of its usual size."""
    if not isinstance(getattr(config, "rope_parameters", None), dict):
        return False
    code = Path(inspect.getfile(type(config)))
    modeling = code.with_name(code.name.replace("configuration_", "modeling_"))
    flat = "rope_type" in config.rope_parameters
    return flat and modeling.is_file() and "mrope_section" in modeling.read_text()


def _sections(small: Mapping[str, Any]) -> list[int]:
    """How many frequencies of a small head each of three axes has."""
    head = small.get("head_dim") or small["hidden_size"] // small["num_attention_heads"]
    partial = small["rope_parameters"].get("partial_rotary_factor") or small.get("partial_rotary_factor") or 1.0
    half = int(head * partial) // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def _take_turns(config: PreTrainedConfig) -> None:
    """Has the kinds of layers take turns, where the configuration's own pattern leaves one out of the body."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if not kinds or set(kinds[2:-2]) == set(kinds) or text.model_type in OWN_PATTERN:
        return
    distinct = list(dict.fromkeys(kinds))
    first = 0 if distinct[(LAYERS - 1) % len(distinct)] == kinds[-1] else 1
    text.layer_types = [distinct[(first + index) % len(distinct)] for index in range(len(kinds))]


def _filled(auto: Any, config: PreTrainedConfig, weights: float, embeddings: float) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and parameter.is_floating_point():
                    embedding = re.search("embed|wte|lm_head", name)
                    parameter.normal_(0, embeddings if embedding else weights)
                elif name.endswith("sinks"):
                    parameter.normal_(0, 0.5)
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id = 0, None
    for name in ("forced_eos_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        if hasattr(generation, name):
            setattr(generation, name, None)
    return model.eval()


def _distinct_tokens(model: Any) -> int:
    """How many different tokens a model generates; 0 for one that cannot generate."""
    try:
        answer = model.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            do_sample=False,
            max_new_tokens=20,
            suppress_tokens=list(SPECIAL),
        )
    except Exception:
        return 0
    return len(set(answer[0, PROMPT.shape[1] :].tolist()))
