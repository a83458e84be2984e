"""LoRA adapters of language models in PEFT's format: what is in their files, and which are refused.

An adapter adds `B A x · scaling` to the output of some linear layers (LoRA, https://arxiv.org/abs/2106.09685).
Which layers these are, the names of its tensors say: PEFT saves a pair for each layer that its `target_modules`
chose, be they names, an expression or "all-linear". Device and worker each load the tensors of their own layers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from split_common.errors import ConfigError, ModelError, UnknownModel, UnsupportedFeature
from split_common.models.checkpoint import Checkpoint
from split_common.models.checkpoint_files import directory_name, local_files
from split_common.models.verification import find_manifest
from split_common.protocol.payloads import UseAdapter
from split_common.system.files import user_path
from split_common.trust.fleet import Fleet
from split_common.trust.manifest import Manifest

#: Most adapters of one worker or device, and the highest rank of one, because they take memory.
MAX_ADAPTERS = 256
MAX_RANK = 1024

#: Names of PEFT's files.
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"

#: What precedes a module's name in those of PEFT's tensors.
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight", re.DOTALL)
#: What PEFT calls all linear layers but the last one.
_ALL_LINEAR = "all-linear"
_Value = TypeVar("_Value", int, float)
_NAME = re.compile(r"[\w.@+:/-]{1,128}", re.ASCII)

#: Settings that say how the adapter was made, or that its tensors show, and change nothing here.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

#: Ways to draw the first weights that leave the model's own as they are. The others, like "pissa", change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class LoraConfig(msgspec.Struct, frozen=True):
    """The settings in adapter_config.json that have an effect."""

    peft_type: str
    r: Annotated[int, Meta(ge=1, le=MAX_RANK)] = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, Annotated[int, Meta(ge=1, le=MAX_RANK)]] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    target_modules: str | list[str] = _ALL_LINEAR
    exclude_modules: str | list[str] = []
    layers_to_transform: int | list[int] = []
    layers_pattern: str | list[str] = []

    def chooses(self, module: str) -> bool:
        """Whether PEFT would adapt a module: it ignores tensors of others. See its `check_target_module_exists`."""
        if _names(self.exclude_modules, module):
            return False
        if self.target_modules != _ALL_LINEAR:
            if not _names(self.target_modules, module):
                return False
            if isinstance(self.target_modules, str):
                return True
        layers, names = _listed(self.layers_to_transform), _listed(self.layers_pattern)
        stacks = [rf"(?:^|.*?\.){name}" for name in names if name] or [r".*?\.[^.]*"]
        found = next(filter(None, (re.match(rf"{stack}\.(\d+)\.", module) for stack in stacks)), None)
        return not layers or (found is not None and int(found[1]) in layers)

    def rank(self, module: str) -> int:
        """The rank in a module."""
        return _matched(self.rank_pattern, module) or self.r

    def scaling(self, module: str) -> float:
        """What a module's low-rank product is multiplied by; with `use_rslora` https://arxiv.org/abs/2312.03732."""
        rank, alpha = self.rank(module), _matched(self.alpha_pattern, module)
        alpha = self.lora_alpha if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class AdapterCheckpoint(Checkpoint):
    """An adapter's files as a checkpoint. Its digests cover which model it is for.

    Args:
        name: the names of the model and of the adapter.
        directory: PEFT's files.
        model: the root of the model's manifest.
    """

    def __init__(self, name: str, directory: Path, model: bytes) -> None:
        find = local_files(directory)
        names = {"config.json": CONFIG_FILE, "model.safetensors": TENSORS_FILE}
        super().__init__(name, None, lambda file: find(names.get(file, file)))
        self._model = model

    @cached_property
    def config_sha256(self) -> bytes:
        """SHA-256 of adapter_config.json and of the root of the model's manifest, 32 bytes."""
        return hashlib.sha256(b"lambda-split adapter\0" + self._model + self.config_bytes).digest()


class Adapter:
    """A LoRA of a language model. Made by `read_adapter`.

    Args:
        name: what it is called.
        checkpoint: its files.

    Raises:
        ModelError: a file is malformed, or tensors and settings contradict each other.
        UnsupportedFeature: it is more than a LoRA of linear layers.
    """

    def __init__(self, name: str, checkpoint: AdapterCheckpoint) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.config = _read_config(name, checkpoint)
        #: The names of the tensors A and B of each module, by the module's name in the model.
        self.modules = self._find_modules()

    def _find_modules(self) -> dict[str, tuple[str, str]]:
        halves: dict[str, dict[str, str]] = {}
        for tensor in self.checkpoint.tensor_names:
            match = _TENSOR.fullmatch(tensor)
            if match is None:
                raise UnsupportedFeature(
                    f"the adapter {self.name} has a tensor {tensor!r}: only a LoRA of linear layers runs split"
                )
            halves.setdefault(match["module"].removeprefix(_PREFIX), {})[match["half"]] = tensor
        for module, pair in halves.items():
            if not self.config.chooses(module):
                raise ModelError(
                    f"the adapter {self.name} has tensors of {module}, which PEFT would not use: target_modules, "
                    f"exclude_modules or layers_to_transform in {CONFIG_FILE} leave it out"
                )
            if len(pair) < 2:
                raise ModelError(f"the adapter {self.name} has only one of the two tensors of {module}")
            rank = self.config.rank(module)
            first, second = (self.checkpoint.entry(pair[half]).shape for half in "AB")
            if len(first) != 2 or len(second) != 2 or first[0] != rank or second[1] != rank:
                raise ModelError(
                    f"the adapter {self.name}: tensors of shapes {list(first)} and {list(second)} for {module}, "
                    f"whose rank is {rank} by {CONFIG_FILE}"
                )
        return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


@dataclass(frozen=True)
class VerifiedAdapter:
    """An adapter whose tensors are those of a manifest."""

    adapter: Adapter
    #: What the first request of a session says to choose it. Its hash is the root of the adapter's manifest.
    request: UseAdapter

    @property
    def name(self) -> str:
        return self.adapter.name


def layer_of(module: str, stack: str) -> int | None:
    """The index of the layer that a module is in; None for one outside the stack of layers of this name."""
    match = re.match(rf"{re.escape(stack)}\.(\d+)\.", module)
    return int(match[1]) if match else None


def parse_adapters(given: Iterable[str]) -> dict[str, Path]:
    """The directories of adapters by their names, of options like `NAME=DIR` or `DIR`.

    Raises:
        ConfigError: a name is invalid or given twice, or there are too many.
        UnknownModel: a directory holds no adapter.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if user_path(text).is_dir() or not equals:
            name, rest = "", text
        directory = user_path(rest)
        name = check_name(name or directory_name(directory))
        if name in found:
            raise ConfigError(f"two adapters are called {name}: give one another name, as in --adapter NAME=DIR")
        found[name] = check_files(directory)
    if len(found) > MAX_ADAPTERS:
        raise ConfigError(f"{len(found)} adapters: at most {MAX_ADAPTERS} can be loaded")
    return found


def check_name(name: str) -> str:
    """Returns an adapter's name. Raises ConfigError if it is not one."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"invalid name of an adapter {name!r}: expected 1 to 128 letters, digits and . _ @ + : / -, as in "
            "--adapter NAME=DIR"
        )
    return name


def check_files(directory: Path) -> Path:
    """Returns an adapter's directory. Raises UnknownModel if it holds none."""
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (directory / file).is_file():
            raise UnknownModel(
                f"no adapter in {directory}: it lacks {file}; expected what PEFT's save_pretrained writes, with "
                "tensors in safetensors format"
            )
    return directory


def read_adapter(name: str, directory: Path, model: Manifest) -> Adapter:
    """Reads an adapter's settings and the names of its tensors.

    Args:
        name: what it is called.
        directory: PEFT's files.
        model: the manifest of the model that it is for.

    Raises:
        ModelError, UnsupportedFeature: see `Adapter`.
    """
    return Adapter(name, AdapterCheckpoint(f"{model.name}+{name}", directory, model.root))


def verified_adapters(fleet: Fleet, directories: Mapping[str, Path], model: Manifest) -> list[VerifiedAdapter]:
    """Reads adapters, and checks their tensors against the fleet's manifests.

    Args:
        fleet: whose manifests are searched.
        directories: PEFT's files, by the adapters' names.
        model: the manifest of the model that they are for.

    Raises:
        ModelError, UnsupportedFeature: see `Adapter`.
        KeysError: a configured fleet has no manifest with these settings for this model.
        TensorMismatch: it has one, but a tensor differs.
    """
    verified = []
    for name, directory in directories.items():
        adapter = read_adapter(name, directory, model)
        checkpoint = adapter.checkpoint
        command = f"lambda-split keys add-model MODEL --adapter {name}={directory}"
        manifest = find_manifest(fleet, checkpoint, checkpoint.tensor_names, command)
        verified.append(VerifiedAdapter(adapter, UseAdapter(name, manifest.root)))
    return verified


def _read_config(name: str, checkpoint: Checkpoint) -> LoraConfig:
    raw: dict[str, Any] = checkpoint.config
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedFeature(f"the adapter {name} is a {kind} of PEFT, which does not run split: use a LoRA")
    known = {field.name for field in msgspec.structs.fields(LoraConfig)}
    for setting, value in raw.items():
        if value and setting not in known and setting not in _WITHOUT_EFFECT:
            raise UnsupportedFeature(f"the adapter {name} has {setting}={value!r}, which does not run split")
    try:
        config = msgspec.convert({key: value for key, value in raw.items() if value is not None}, LoraConfig)
        chosen = [each for each in (config.target_modules, config.exclude_modules) if isinstance(each, str)]
        patterns = [*config.rank_pattern, *config.alpha_pattern, *_listed(config.layers_pattern)]
        for pattern in (*patterns, *chosen):
            re.compile(pattern)
    except (msgspec.ValidationError, re.error) as error:
        raise ModelError(f"the adapter {name}: {CONFIG_FILE} is malformed: {error}") from None
    if config.bias != "none":
        raise UnsupportedFeature(f"the adapter {name} has bias={config.bias!r}: only bias='none' runs split")
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise UnsupportedFeature(
            f"the adapter {name} has init_lora_weights={config.init_lora_weights!r}, which changes the model's own "
            "weights: convert it to a plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    return config


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _names(chosen: str | list[str], module: str) -> bool:
    """Whether an expression, or one of the names of a list, stands for a module, as PEFT reads them."""
    if isinstance(chosen, str):
        return re.fullmatch(chosen, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in chosen)


def _matched(pattern: Mapping[str, _Value], module: str) -> _Value | None:
    """The value of the first key that a module's name ends with, as in PEFT's `get_pattern_key`; None without."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), None)
