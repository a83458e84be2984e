"""What is private in transformers. Written against 5.24."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2.meta
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import chat_template_utils
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,
    OutputRecorder,
    _active_collector,
    maybe_install_capturing_hooks,
)

# --- loading -----------------------------------------------------------------------------------------------


def model_class(config: Any, *, images: bool = False) -> tuple[type[nn.Module], Any] | None:
    """The class that transformers' auto classes choose for a configuration, and the configuration that it takes.

    Args:
        config: of a checkpoint.
        images: whether it must be that of `AutoModelForImageTextToText`; if not, `AutoModelForCausalLM` is asked
            first. Some types have a class for their text alone, which takes a part of the configuration.

    Returns:
        None if there is no class.

    Written against transformers 5.24. If it breaks, look at how `_BaseAutoModelClass.from_pretrained` in
    `models/auto/auto_factory.py` finds the class, and what it does with `text_config`.
    """
    autos = (AutoModelForImageTextToText,) if images else (AutoModelForCausalLM, AutoModelForImageTextToText)
    for auto in autos:
        found = auto._model_mapping.get(type(config), None)
        chosen: type[nn.Module] | None = found[0] if isinstance(found, list | tuple) else found
        if chosen is None:
            continue
        text = config.sub_configs.get("text_config")
        is_part = text is not None and getattr(chosen, "config_class", None) is text
        return chosen, config.get_text_config() if is_part else config
    return None


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """What a model calls the tensors of a checkpoint, by their names there.

    Written against transformers 5.24. If it breaks, look at how `convert_and_load_state_dict_in_model` in
    `core_model_loading.py` renames a tensor.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    known = model.state_dict()
    renamed = {}
    for name in names:
        new = rename_source_key(name, renamings, converters, model.base_model_prefix, known)[0]
        if new not in known and name in known:
            new = rename_source_key(name, [], [], model.base_model_prefix, known)[0]
        renamed[name] = new
    return renamed


def mtp_names(layers: int, count: int, names: Iterable[str]) -> dict[str, str]:
    """What transformers calls the tensors of MTP layers, by their names in a checkpoint.

    These are names in its `MtpModel`: `layers.0.mtp_block.` and a name within a decoder layer, and
    `layers.0.enorm.weight`, `hnorm`, `eh_proj` and `post_norm`.

    Args:
        layers: the number of the model's decoder layers, behind which the MTP layers may be counted.
        count: the number of its MTP layers.

    Written against transformers 5.24. If it breaks, look at `MtpModel.get_weight_conversions` in
    `modeling_layers.py`.
    """
    numbers = range(layers, layers + count)
    renamings = [WeightRenaming(f"layers.{n}.", f"layers.{n - layers}.mtp_block.") for n in numbers]
    renamings += get_checkpoint_conversion_mapping("MtpModel") or []
    return {name: rename_source_key(name, renamings, [])[0] for name in names}


def load_state(
    model_class: type, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[Any, dict[str, Any]]:
    """A model with the given tensors, made by transformers' own `from_pretrained`.

    Args:
        model_class: a class of transformers, or one derived from it, even with a `from_pretrained` of its own.
        config: the model's configuration.
        state: the tensors, by their names in a checkpoint, which transformers converts as usual.
        dtype: dtype of the parameters; None keeps that of the tensors.

    Returns:
        The model, and sets under `missing_keys`, `unexpected_keys` and `mismatched_keys`.

    Written against transformers 5.24. If it breaks, look at `PreTrainedModel.from_pretrained` in
    `modeling_utils.py`: whether it is a class method, and what it does with `state_dict`.
    """
    model, info = PreTrainedModel.from_pretrained.__func__(
        model_class,
        None,
        config=config,
        state_dict=state,
        dtype=dtype if dtype is not None else "auto",
        # Quantizers would choose a GPU.
        device_map={"": "cpu"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return model, info


def dequantize_gguf(model: Any, file: Path, names: Collection[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Some of a GGUF file's tensors, dequantized one at a time, by their names in a model.

    Args:
        model: of the class that takes them; its tensors may be on the meta device.
        file: the GGUF file.
        names: of the file's tensors. Those that the model does not know are left out.
        dtype: what they become.

    Raises:
        ValueError, NotImplementedError: transformers does not know the file's architecture, or reads it otherwise.

    Written against transformers 5.24. If it breaks, look at the second half of `load_gguf_checkpoint` in
    `modeling_gguf_pytorch_utils.py`, which does the same with all tensors.
    """
    from gguf import GGUFReader, dequantize
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    parsed = load_gguf_checkpoint(str(file)) | {"tensors": {}}
    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    if is_gguf_arch_supported(architecture):
        raise NotImplementedError(f"GGUF files of {architecture} are read as a whole: use safetensors")
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
    known = get_gguf_hf_weights_map(model, processor)
    for tensor in reader.tensors:
        if tensor.name not in names:
            continue
        weights = dequantize(tensor.data, tensor.tensor_type)
        weights, name, _ = processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=known, parsed_parameters=parsed
        )
        if name in known:
            parsed["tensors"][known[name]] = torch.from_numpy(weights.copy()).to(dtype)
    return dict(parsed["tensors"])


#: Attributes of a model's class that declare its weights not tied: for a part whose embeddings are elsewhere.
#: Written against transformers 5.24; if it breaks, look at `get_expanded_tied_weights_keys` in `modeling_utils.py`.
UNTIED_CLASS: dict[str, Any] = {"_tied_weights_keys": {}}


def untie(model: Any) -> None:
    """Declares the weights of a new model not tied.

    Written against transformers 5.24. If it breaks, look at what reads `all_tied_weights_keys` in
    `modeling_utils.py`.
    """
    model.all_tied_weights_keys = {}


# --- calling -----------------------------------------------------------------------------------------------


def cache_name(module_class: type[nn.Module]) -> str:
    """The name of a forward's argument for the cache: `cache`, or `past_key_values` in models with the older name.

    Written against transformers 5.24. If it breaks, look at `forward` in `models/llama/modeling_llama.py`.
    """
    return "cache" if "cache" in forward_parameters(module_class) else "past_key_values"


def forward_parameters(module_class: type[nn.Module]) -> frozenset[str]:
    """Names of the parameters of a class's `forward`, without transformers' decorators.

    Written against transformers 5.24. If it breaks, look at the decorators of `forward` in
    `models/llama/modeling_llama.py`.
    """
    return frozenset(inspect.signature(inspect.unwrap(module_class.forward)).parameters)


def cached_kinds(config: Any) -> list[str]:
    """The kind of each layer that has a cache, such as `sliding_attention`, by a decoder's configuration.

    Written against transformers 5.24. If it breaks, look at `DynamicCache.__init__` in `cache_utils.py`.
    """
    return list(get_layer_types_and_kwargs(config)[0])


def attention_implementation(module: Any) -> str | None:
    """The name of the attention that a model uses, as `set_attn_implementation` takes it.

    Written against transformers 5.24. If it breaks, look at `set_attn_implementation` in `modeling_utils.py`.
    """
    name: str | None = module.config._attn_implementation
    return name


# --- generating --------------------------------------------------------------------------------------------


def is_stateful(model: Any) -> bool:
    """Whether a model refuses assisted decoding, because its cache cannot be cropped.

    Written against transformers 5.24. If it breaks, look at what raises "assisted generation is not supported with
    stateful models" in `generation/utils.py`.
    """
    return bool(model._is_stateful)


def declare_croppable(model: Any) -> None:
    """Makes `is_stateful` False for a model, whatever its class says: its caches can be cropped.

    Written against transformers 5.24. If it breaks, look at what `is_stateful` names.
    """
    model._is_stateful = False


def complete_config(model: Any, given: GenerationConfig) -> GenerationConfig:
    """A copy of a generation configuration, with the model's defaults for what is not given.

    Raises:
        ValueError: the values contradict each other.

    Written against transformers 5.24. If it breaks, look at how `generate` in `generation/utils.py` begins.
    """
    config, _ = model._prepare_generation_config(given)
    return config


def complete_lengths(
    model: Any, config: GenerationConfig, given: GenerationConfig, prompt: int
) -> GenerationConfig:
    """Fills in special tokens and lengths: `max_length` and `min_length` then count the prompt.

    Args:
        model: the model that generates.
        config: made by `complete_config`; it is changed.
        given: the caller's configuration.
        prompt: number of tokens in the prompt.

    Raises:
        ValueError: the values contradict each other.

    Written against transformers 5.24. If it breaks, look at the steps of `generate` in `generation/utils.py` that
    prepare special tokens and the maximum length.
    """
    own = model.generation_config
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu", batch_size=1)
    completed: GenerationConfig = model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=given.max_length is None and own.max_length is None,
        has_default_min_length=given.min_length is None and own.min_length is None,
        model_input_name="input_ids",
        input_ids_length=prompt,
        inputs_tensor=None,
    )
    return completed


def eos_tokens(config: GenerationConfig) -> frozenset[int]:
    """The token ids that end a text, from a configuration that `complete_lengths` completed.

    Written against transformers 5.24. If it breaks, look at `_prepare_special_tokens` in `generation/utils.py`.
    """
    eos = config._eos_token_tensor
    return frozenset() if eos is None else frozenset(eos.reshape(-1).tolist())


def logits_processors(model: Any, config: GenerationConfig, prompt: int, own: Sequence[Any] = ()) -> Any:
    """The processors that `generate` applies, as a `LogitsProcessorList` on the CPU.

    Args:
        model: the model that generates.
        config: completed by `complete_lengths`.
        prompt: number of tokens in the prompt.
        own: further processors. They apply, as `generate` has it, before temperature, top_k and the like.

    Raises:
        ValueError: the values contradict each other.

    Written against transformers 5.24. If it breaks, look at the call of `_get_logits_processor` by `generate` in
    `generation/utils.py`.
    """
    return model._get_logits_processor(config, prompt, logits_processor=list(own), device="cpu")


# --- chat templates ----------------------------------------------------------------------------------------


@functools.lru_cache(16)
def template_variables(template: str) -> frozenset[str]:
    """The variables that a chat template reads, without the functions that transformers gives to all of them.

    Raises:
        jinja2.TemplateError: it is not a template.

    Written against transformers 5.24. If it breaks, look at `_compile_jinja_template` in
    `utils/chat_template_utils.py`.
    """
    environment = chat_template_utils._compile_jinja_template(template).environment
    variables: set[str] = jinja2.meta.find_undeclared_variables(environment.parse(template))
    return frozenset(variables - environment.globals.keys())


def reserved_template_variables(tokenizer: Any) -> frozenset[str]:
    """The variables of chat templates that `apply_chat_template` sets itself, or takes as arguments.

    Written against transformers 5.24. If it breaks, look at `apply_chat_template` in `tokenization_utils_base.py`.
    """
    arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents", "kwargs"}
    return frozenset(arguments | {"messages"} | set(tokenizer.special_tokens_map))


# --- outputs of single layers ------------------------------------------------------------------------------


def captured_outputs(owner: Any, layer: nn.Module, name: str) -> dict[str, int]:
    """How many outputs transformers' hooks capture in a layer, by their names in a model's output.

    Args:
        owner: the module that calls the layers.
        layer: one of them.
        name: the layer's name in the model.

    Returns:
        Nothing for models that gather such outputs by code of their own.

    Written against transformers 5.24. If it breaks, look at `recursively_install_hooks` in
    `utils/output_capturing.py`.
    """
    counts: dict[str, int] = {}
    for key, specs in _CAN_RECORD_REGISTRY.get(owner).items():
        for spec in specs if isinstance(specs, list) else [specs]:
            recorder = spec if isinstance(spec, OutputRecorder) else None
            kind = recorder.target_class if recorder else spec if isinstance(spec, type) else None
            suffix = recorder.class_name if recorder else spec if isinstance(spec, str) else None
            part = f".{recorder.layer_name.strip('.')}." if recorder and recorder.layer_name else ""
            for inner, module in layer.named_modules(prefix=name):
                matches = (kind is not None and isinstance(module, kind)) or (
                    suffix is not None and inner.endswith(suffix)
                )
                if matches and part in f"{inner}.":
                    counts[key] = counts.get(key, 0) + 1
    return counts


def install_capturing_hooks(model: Any) -> None:
    """Installs the hooks that capture outputs, which do nothing until an output is asked for.

    Written against transformers 5.24. If it breaks, look at `maybe_install_capturing_hooks` in
    `utils/output_capturing.py`.
    """
    maybe_install_capturing_hooks(model)


def active_captures() -> dict[str, Any] | None:
    """The outputs that are captured in the forward under way, by name; None if none is.

    Written against transformers 5.24. If it breaks, look at `capture_outputs` in `utils/output_capturing.py`.
    """
    captures: dict[str, Any] | None = _active_collector.get()
    return captures


def capture(captures: dict[str, Any], name: str, output: Any) -> None:
    """Adds an output to those that are captured, or None in its place if the caller did not select it.

    Written against transformers 5.24. If it breaks, look at `append_hidden_state` in `utils/output_capturing.py`.
    """
    selected = captures.get("_hidden_states_layers") if name == "hidden_states" else None
    captures[name].append(output if selected is None or len(captures[name]) in selected else None)
