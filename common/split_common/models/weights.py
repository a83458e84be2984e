"""Reads some of a checkpoint's tensors with torch; and the two sides of a split model that do so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from split_common.errors import MissingTensor, ModelError
from split_common.models.checkpoint import Checkpoint

#: The side that loads a part of a model: the device its head and tail, the worker its body.
Side = Literal["device", "worker"]


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Reads some of a checkpoint's tensors, by name. They stay mapped from their files.

    Raises:
        MissingTensor: a file lacks a tensor that the index says it holds.
        ModelError: a file is malformed.
    """
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(checkpoint.files[name], []).append(name)
    state = {}
    for file, tensors in by_file.items():
        try:
            with safe_open(checkpoint.path(file), framework="pt") as handle:
                present = set(handle.keys())
                for name in tensors:
                    if name not in present:
                        raise MissingTensor(f"{checkpoint.name}: {file} lacks the tensor {name}")
                    state[name] = handle.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{checkpoint.name}: {file} is malformed: {error}") from None
    return state
