"""LoRA adapters of a split model: their parts in head and tail are here, those in the body on workers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from split_common.engine.lora import ChosenAdapter, add_adapter
from split_common.errors import ConfigError, UnknownAdapter, UnsupportedFeature
from split_common.models.adapters import MAX_ADAPTERS, check_files, check_name, parse_adapters, verified_adapters
from split_common.models.layer_stack import LayerStack
from split_common.models.split import Split
from split_common.protocol.payloads import UseAdapter
from split_common.system.files import user_path
from split_common.trust.fleet import Fleet
from split_common.trust.manifest import Manifest

#: One adapter's directory, or several by name.
AdapterDirectories = str | Path | Mapping[str, str | Path]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter whose part in head and tail is loaded."""

    #: By which forwards here know it, in the order of loading.
    number: int
    #: By which a session asks its worker for it.
    request: UseAdapter
    directory: Path

    @property
    def name(self) -> str:
        return self.request.name


@dataclass
class ModelAdapters:
    """The adapters of one split model. Copies of the model share them.

    Args:
        fleet: whose manifests list the adapters' tensors.
        manifest: the model's.
    """

    fleet: Fleet
    manifest: Manifest
    #: The adapter of `generate` and `forward`.
    chosen: ChosenAdapter = field(default_factory=ChosenAdapter)
    _loaded: dict[str, LoadedAdapter] = field(default_factory=dict)

    def __deepcopy__(self, _memo: object) -> ModelAdapters:
        return self

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order of loading."""
        return list(self._loaded)

    def load(self, model: Any, stack: LayerStack, split: Split, directories: Mapping[str, Path]) -> None:
        """Puts the device's parts of adapters into a model.

        Raises:
            ConfigError: there is an adapter of such a name, or too many.
            SplitError: see `verified_adapters` and `add_adapter`.
        """
        for name in directories:
            if name in self._loaded:
                raise ConfigError(f"the model has an adapter {name} already: give this one another name")
        if len(self) + len(directories) > MAX_ADAPTERS:
            raise ConfigError(f"at most {MAX_ADAPTERS} adapters can be loaded")
        for verified in verified_adapters(self.fleet, directories, self.manifest):
            adapter = LoadedAdapter(len(self), verified.request, directories[verified.name])
            add_adapter(model, stack, split, "device", verified.adapter, adapter.number, self.chosen)
            self._loaded[adapter.name] = adapter

    def get(self, name: str) -> LoadedAdapter:
        """The adapter of a name. Raises UnknownAdapter."""
        if name not in self._loaded:
            raise UnknownAdapter(f"the model has no adapter {name!r} (it has: {', '.join(self.names) or 'none'})")
        return self._loaded[name]

    @property
    def active(self) -> LoadedAdapter | None:
        """The adapter of `generate` and `forward`."""
        return None if self.chosen.number is None else list(self._loaded.values())[self.chosen.number]

    @property
    def active_request(self) -> UseAdapter | None:
        """By which a session asks for the active adapter."""
        return None if self.active is None else self.active.request

    @property
    def worker_options(self) -> str:
        """The options of the command that starts a worker with these adapters, with a blank before each."""
        given = (shlex.quote(f"{name}={adapter.directory}") for name, adapter in self._loaded.items())
        return "".join(f" --adapter {each}" for each in given)


def adapter_directories(given: AdapterDirectories) -> dict[str, Path]:
    """The directories of adapters by name. Raises ConfigError or UnknownModel, see `parse_adapters`."""
    if isinstance(given, Mapping):
        return {check_name(name): check_files(user_path(directory)) for name, directory in given.items()}
    return parse_adapters([str(given)])


class WithAdapters:
    """transformers' methods for adapters, on a split model: what they cannot do is refused by name."""

    #: The model's `SplitParts`. transformers evaluates the annotation when it makes a class.
    split_parts: Any

    def load_adapter(self, peft_model_id: str | Path, adapter_name: str | None = None, **options: Any) -> None:
        """Loads a LoRA in PEFT's format into head and tail, and makes it active. Workers need to have it, too.

        Args:
            peft_model_id: its directory.
            adapter_name: what it is called; None for the directory's name.
            options: none can be split.

        Raises:
            UnknownModel, ModelError, UnsupportedFeature: it cannot be loaded or split.
            KeysError, TensorMismatch: no manifest of the fleet lists it.
            ConfigError: the name is invalid, or another adapter has it.
        """
        for name, value in options.items():
            if value:
                raise UnsupportedFeature(
                    f"load_adapter with {name} does not run split: give a directory and a name"
                )
        parts = self.split_parts
        directories = adapter_directories(peft_model_id if adapter_name is None else {adapter_name: peft_model_id})
        parts.adapters.load(self, parts.stack, parts.split, directories)
        self.set_adapter(*directories)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Makes one of the adapters active. Raises UnknownAdapter, or UnsupportedFeature for several at once."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise UnsupportedFeature("several adapters at once do not run split: choose one")
        adapters = self.split_parts.adapters
        adapters.chosen.number = adapters.get(names[0]).number

    def disable_adapters(self) -> None:
        """Makes no adapter active. `set_adapter` makes one active again."""
        self.split_parts.adapters.chosen.number = None

    def active_adapters(self) -> list[str]:
        """The name of the active adapter, in a list; an empty one without."""
        active = self.split_parts.adapters.active
        return [] if active is None else [active.name]

    def add_adapter(self, *_args: Any, **_options: Any) -> None:
        """Refused: an adapter has a part on the workers."""
        raise UnsupportedFeature(
            "add_adapter does not run split: use load_adapter, for one in PEFT's format, and give workers --adapter"
        )

    def delete_adapter(self, *_args: Any, **_options: Any) -> None:
        """Refused: other sessions may have it."""
        raise UnsupportedFeature("an adapter of a split model stays loaded: disable_adapters makes none active")

    def enable_adapters(self) -> None:
        """Refused: it does not say which adapter."""
        raise UnsupportedFeature("enable_adapters does not say which adapter: use set_adapter")

    def get_adapter_state_dict(self, *_args: Any, **_options: Any) -> Any:
        """Refused: this process holds only a part of an adapter."""
        raise UnsupportedFeature("a split model holds only a part of an adapter: read its files")
