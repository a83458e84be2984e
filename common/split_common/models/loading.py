"""Loading one side of a split model: only its own tensors, under their own names, checked against the manifest."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig

from split_common.compat.transformers import UNTIED_CLASS, dequantize_gguf, load_state, model_class, untie
from split_common.errors import (
    MissingTensor,
    ModelError,
    SplitError,
    UnknownModel,
    UnsupportedArchitecture,
    UnsupportedFeature,
)
from split_common.models.cache_layers import check_cache
from split_common.models.checkpoint import Checkpoint
from split_common.models.layer_links import check_links
from split_common.models.layer_stack import Absent, LayerStack, PassThrough, find_stack
from split_common.models.prefix import LAYER, find_prefix
from split_common.models.quantization import GGUF, Quantization, assemble_torchao, prepare_quantization
from split_common.models.split import Split
from split_common.models.weights import Side, read_tensors

#: Most layers of a model. Its modules are made, without weights, before anything else is known of it.
MAX_LAYERS = 4096

#: Defaults for `generate` that are numbers.
_NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_length",
    "max_length",
    "min_new_tokens",
    "max_new_tokens",
)

#: A layer's number in the name of a tensor.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass
class ModelSpec:
    """What a language model's checkpoint is, before any weight is read. Made by `read_spec`."""

    checkpoint: Checkpoint
    config: Any
    model_class: type[nn.Module]
    #: What precedes a layer's index in the names of the checkpoint's tensors, like `model.layers` or `h`.
    prefix: str
    #: How quantized weights are run; None if they are not quantized.
    quantization: Quantization | None = None

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return int(self.text_config.num_hidden_layers)

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder, which may be a part of the whole."""
        return self.config.get_text_config(decoder=True)

    def layer_of(self, tensor: str) -> int | None:
        """The decoder layer that a checkpoint's tensor belongs to; None for embeddings, norms and the head."""
        match = LAYER.match(tensor)
        return int(match["index"]) if match and match["prefix"] == self.prefix else None

    def own_tensors(self, split: Split, side: Side) -> list[str]:
        """Checkpoint names of the tensors that a side loads."""
        own = []
        for name in self.checkpoint.tensor_names:
            layer = self.layer_of(name)
            in_body = layer is not None and layer in split.body
            if in_body == (side == "worker") and (layer is None or layer < self.layers):
                own.append(name)
        return own


def read_spec(model: str | Checkpoint, revision: str | None = None, *, images: bool = False) -> ModelSpec:
    """Reads the configuration of a language model, or of one that takes images, too.

    Args:
        model: a checkpoint, a directory with one, or a hub id.
        revision: of a hub id.
        images: whether the class must take images. If not, it is the one for texts, where the type has both.

    Raises:
        UnknownModel: no checkpoint is found, or transformers does not know its type.
        UnsupportedArchitecture: it is not a decoder-only model that can be cut, or takes no images.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.resolve(model, revision)
    _refuse_adapter(checkpoint)
    try:
        config = _config(checkpoint)
    except SplitError:
        raise
    except Exception as error:
        if checkpoint.config.get("auto_map"):
            raise UnsupportedArchitecture(
                f"{checkpoint.name} comes with Python code of its own (auto_map in config.json), which is not run: "
                f"transformers does not know the type {checkpoint.config.get('model_type')!r}"
            ) from None
        if checkpoint.class_name is not None:
            raise UnsupportedArchitecture(
                f"{checkpoint.name} is a {checkpoint.class_name} of diffusers, not a language model: "
                "`lambda-split image` runs diffusion models, `lambda-split doctor --model` shows how one is cut"
            ) from None
        raise UnknownModel(f"{checkpoint.name}: {_first_line(error)}") from None
    chosen = model_class(config, images=images)
    name = getattr(config, "model_type", type(config).__name__)
    if chosen is None or getattr(config, "is_encoder_decoder", False):
        kind = "model for images and text" if images else "language model"
        raise UnsupportedArchitecture(f"{name} is not a decoder-only {kind}")
    own_class, own_config = chosen
    quantization = prepare_quantization(config, own_config, checkpoint.name) if checkpoint.gguf is None else GGUF
    try:
        layers = int(own_config.get_text_config(decoder=True).num_hidden_layers)
        if not 0 < layers <= MAX_LAYERS:
            raise UnsupportedArchitecture(f"{checkpoint.name} has {layers:,} layers: expected 1 to {MAX_LAYERS:,}")
        _check_depth(checkpoint, layers)
        if (width := int(own_config.get_text_config(decoder=True).hidden_size)) < 1:
            raise UnsupportedArchitecture(f"{checkpoint.name}: config.json names a hidden_size of {width}")
        check_cache(own_config, name)
        with torch.device("meta"):
            empty = own_class(own_config)
        prefix = find_prefix(empty, checkpoint.tensor_names, layers)
    except SplitError:
        raise
    except Exception as error:
        raise UnsupportedArchitecture(f"{name} cannot be built: {_first_line(error)}") from None
    return ModelSpec(checkpoint, own_config, own_class, prefix, quantization)


def config_error(place: Path | str, revision: str | None = None) -> str | None:
    """Why transformers cannot read the configuration in a directory or of a hub id, on one line; None if it can."""
    try:
        AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    except Exception as error:
        return _first_line(error)
    return None


def _check_depth(checkpoint: Checkpoint, layers: int) -> None:
    """Raises MissingTensor if no tensor is of the last layers: making thousands in vain takes minutes."""
    numbered = max((int(part) for name in checkpoint.tensor_names for part in _NUMBER.findall(name)), default=0) + 1
    if layers > 2 * numbered:
        raise MissingTensor(
            f"{checkpoint.name}: config.json names {layers:,} layers, and the tensors are of {numbered:,} at most"
        )


def _config(checkpoint: Checkpoint) -> Any:
    """The configuration, as transformers reads it."""
    if (gguf := checkpoint.gguf) is not None:
        return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The checkpoint's own Python never runs; if transformers knows the type, it is not needed.
    return AutoConfig.from_pretrained(checkpoint.path("config.json").parent, trust_remote_code=False)


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    """Refuses an adapter beside the weights, which transformers would load with them.

    Raises:
        UnsupportedArchitecture: there is one.
        ModelError: there may be one: its adapter_config.json is a Git LFS pointer, say.
    """
    if checkpoint.find("adapter_config.json") is None:
        return
    raise UnsupportedArchitecture(
        f"{checkpoint.name} has an adapter (adapter_config.json) beside its weights: merge it into them "
        "(merge_and_unload, save_pretrained), or remove it"
    )


def load_part(
    spec: ModelSpec,
    split: Split,
    side: Side,
    *,
    dtype: torch.dtype | None = None,
    bases: tuple[type, ...] = (),
    fill: Callable[[int], PassThrough] = lambda _: PassThrough(),
    state: dict[str, torch.Tensor] | None = None,
) -> tuple[Any, LayerStack]:
    """Loads a side's part of a model on the CPU. Tensors whose dtype stays the same are mapped from the file.

    Args:
        split: where the model is cut.
        side: "device" keeps all but the body's layers, "worker" the body's layers alone.
        dtype: of the parameters; None keeps the checkpoint's.
        bases: further classes that the model's class derives from.
        fill: makes the layer in one of the body's slots, given its index (device only).
        state: tensors by their names in the checkpoint, in place of those that it has under these.

    Raises:
        InvalidSplit: the cut parts layers of which one uses what the other has computed.
        MissingTensor: the checkpoint lacks a tensor of the part.
        ModelError: its tensors do not fit the model.
        UnsupportedArchitecture: the model cannot be cut between its layers.
    """
    model_class = _part_class(spec, split, side, bases, fill)
    try:
        with _quiet():
            if state is None:
                state = _read_state(spec, model_class, spec.own_tensors(split, side), dtype)
            model, info = load_state(model_class, spec.config, state, dtype)
        if info["missing_keys"]:
            raise MissingTensor(f"{spec.checkpoint.name} lacks the tensor {min(info['missing_keys'])}")
        if info["mismatched_keys"]:
            tensor, found, expected = min(info["mismatched_keys"])
            raise ModelError(f"{spec.checkpoint.name}: {tensor} has the shape {list(found)}, not {list(expected)}")
        model.eval().requires_grad_(False)
        stack = LayerStack(model, spec.layers)
    except (AttributeError, TypeError, NotImplementedError) as error:
        name = spec.model_class.__name__
        raise UnsupportedArchitecture(f"{name} cannot be loaded in parts: {_first_line(error)}") from None
    except (ValueError, RuntimeError, OSError) as error:
        reason = _first_line(error).partition(" For details")[0]
        raise ModelError(f"{spec.checkpoint.name}: its tensors do not make the model: {reason}") from None
    check_links(spec.text_config, split, spec.checkpoint.name)
    return model, stack


def _read_state(
    spec: ModelSpec, model_class: Any, names: list[str], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Some of a checkpoint's tensors, by name, as `load_state` takes them."""
    if (gguf := spec.checkpoint.gguf) is not None:
        with torch.device("meta"):
            empty = model_class(spec.config)
        return dequantize_gguf(empty, gguf, frozenset(names), dtype or torch.get_default_dtype())
    state = read_tensors(spec.checkpoint, names)
    if spec.quantization is not None and spec.quantization.method == "torchao":
        return assemble_torchao(spec.checkpoint, state)
    return state


def generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """The checkpoint's defaults for `generate`: those of generation_config.json, else those in config.json or GGUF.

    They name no cache: with any of transformers' caches but a quantized one, tokens are those of a dynamic one.

    Raises:
        ModelError: they are malformed, or their file cannot be read.
        UnsupportedFeature: they ask for a quantized cache.
    """
    config = _defaults(checkpoint)
    if config.cache_implementation == "quantized":
        raise UnsupportedFeature(
            f"{checkpoint.name}: the defaults for generate ask for a quantized cache, which does not run split: "
            "remove cache_implementation from generation_config.json (or config.json)"
        )
    config.cache_implementation = None
    return config


def _defaults(checkpoint: Checkpoint) -> GenerationConfig:
    if checkpoint.gguf is not None:
        return GenerationConfig.from_model_config(_config(checkpoint))
    file = checkpoint.find("generation_config.json")
    try:
        if file is not None:
            return _checked(GenerationConfig.from_pretrained(file.parent))
        # The class of a configuration drops what is meant for `generate`.
        return _checked(GenerationConfig.from_model_config(json.loads(checkpoint.path("config.json").read_bytes())))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        name = "config.json" if file is None else "generation_config.json"
        raise ModelError(f"{checkpoint.name}: {name}: {_first_line(error)}") from None


def _checked(config: GenerationConfig) -> GenerationConfig:
    """Returns defaults whose numbers are numbers, which transformers finds out late. Raises TypeError."""
    for name in _NUMBERS:
        if (value := getattr(config, name, None)) is not None and type(value) not in (int, float):
            raise TypeError(f"{name} is {value!r}, which is not a number")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(config, name, None)
        if value is not None and any(
            type(token) is not int for token in (value if type(value) is list else [value])
        ):
            raise TypeError(f"{name} is {value!r}, which is neither a token's id nor a list of them")
    return config


def _part_class(
    spec: ModelSpec, split: Split, side: Side, bases: tuple[type, ...], fill: Callable[[int], PassThrough]
) -> Any:
    """The model's class with the other side's layers replaced before weights are loaded.

    It keeps the original's module and name, by which transformers finds the conversions for its checkpoints.
    """
    original: Any = spec.model_class

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original.__init__(self, config, *args, **kwargs)
        owner, attribute = find_stack(self, spec.layers)
        slots = getattr(owner, attribute)
        for index in range(spec.layers):
            if (index in split.body) == (side == "device"):
                slot = fill(index) if side == "device" else PassThrough()
                slot.imitate(slots[index])
                slots[index] = slot
        if side == "worker":
            strip(self, slots)
            untie(self)

    namespace = {
        "__init__": __init__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    if side == "worker":
        namespace |= UNTIED_CLASS
    return type(original.__name__, (*bases, original), namespace)


def strip(module: nn.Module, stack: nn.ModuleList) -> None:
    """Replaces all modules with parameters that are not in the stack, and bare parameters beside it.

    In the place of these are buffers of any values, because transformers initializes them. `LayerStack` refuses a
    model whose layers are handed something that depends on them.
    """
    bare = dict(module.named_parameters(recurse=False))
    for name, parameter in bare.items():
        delattr(module, name)
        module.register_buffer(name, parameter.detach().clone(), persistent=False)
    module.absent_parameters = frozenset(bare)  # type: ignore[assignment]
    for name, child in list(module.named_children()):
        if child is stack:
            continue
        if any(inner is stack for inner in child.modules()):
            strip(child, stack)
        elif next(child.parameters(), None) is not None:
            setattr(module, name, Absent())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' load report and progress bar, which would report the other side's part as missing."""
    logger = transformers.utils.logging
    level, bars = logger.get_verbosity(), logger.is_progress_bar_enabled()
    logger.set_verbosity(logging.ERROR)
    logger.disable_progress_bar()
    try:
        yield
    finally:
        logger.set_verbosity(level)
        if bars:
            logger.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"config.json names {lines[0]}, which this version of transformers does not know"
    # transformers' checks of a configuration name the field first, and then what is wrong with it.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
