"""`lambda-split doctor --adapter`: whether adapters run on a checkpoint that is split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from split_common.errors import SplitError
from split_device.cli.finding import Finding

if TYPE_CHECKING:
    from split_common.models.loading import ModelSpec
    from split_common.models.split import Split

#: Stands for the root of the model's manifest, which only names the adapter to workers.
_NO_ROOT = bytes(32)


def adapter_findings(
    spec: ModelSpec, split: Split, tried: Split, directories: Mapping[str, Path], kv_bytes: int
) -> Iterator[Finding]:
    """How a worker and a device would run adapters, each found by putting it into parts of the model.

    Args:
        spec: the checkpoint.
        split: the cut, which says what is on the device.
        tried: the layers of the body that are loaded.
        directories: PEFT's files, by the adapters' names.
        kv_bytes: memory for keys and values of the layers that are tried.
    """
    for name, directory in directories.items():
        try:
            detail = _tried(spec, split, tried, name, directory, kv_bytes)
        except SplitError as error:
            yield Finding("adapter", "problem", str(error))
        else:
            yield Finding("adapter", "ok", detail)


def _tried(spec: ModelSpec, split: Split, tried: Split, name: str, directory: Path, kv_bytes: int) -> str:
    """What an adapter changes. Raises SplitError if it does not run."""
    from split_common.engine.adapter_probe import check_adapters
    from split_common.engine.lora import ChosenAdapter, add_adapter
    from split_common.engine.runner import build_runner
    from split_common.models.adapters import Adapter, AdapterCheckpoint
    from split_common.models.loading import load_part

    adapter = Adapter(name, AdapterCheckpoint(f"{spec.checkpoint.name}+{name}", directory, _NO_ROOT))
    model, stack = load_part(spec, split, "device")
    add_adapter(model, stack, split, "device", adapter, 0, ChosenAdapter())
    model, stack = load_part(spec, tried, "worker")
    add_adapter(model, stack, tried, "worker", adapter, 0, ChosenAdapter())
    check_adapters(build_runner(stack, tried, spec.text_config, kv_bytes), 1)
    return f"{name} changes {len(adapter.modules)} linear layers of the model (layers {tried} were tried)"
