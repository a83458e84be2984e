"""Checks a checkpoint against the fleet's signed manifests. Each side checks the part that it loads."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from split_common.errors import KeysError, TensorMismatch
from split_common.models.checkpoint import Checkpoint, HashProgress
from split_common.trust.fleet import Fleet
from split_common.trust.manifest import Manifest, ModelName


def build_manifest(
    checkpoint: Checkpoint, name: str | None = None, progress: HashProgress | None = None
) -> Manifest:
    """Hashes the whole checkpoint.

    Args:
        checkpoint: the model.
        name: the model's name in the fleet; None for the checkpoint's.
        progress: called with the number of bytes just hashed, from several threads.

    Raises:
        KeysError: `name` is not a `ModelName`.
        ModelError: the checkpoint is malformed.
    """
    name = name or re.sub(r"[^A-Za-z0-9._@+/-]", "-", checkpoint.name)[:96]
    try:
        msgspec.convert(name, ModelName)
    except msgspec.ValidationError as error:
        raise KeysError(f"{name!r} cannot name a model: {error}") from None
    return Manifest(name, checkpoint.config_sha256, checkpoint.digest(checkpoint.tensor_names, progress))


def find_manifest(
    fleet: Fleet,
    checkpoint: Checkpoint,
    own_names: Iterable[str],
    command: str = "lambda-split keys add-model MODEL",
) -> Manifest:
    """The fleet's manifest of this checkpoint, against which the tensors to be loaded have been checked.

    If several match, one with the checkpoint's name is preferred. A loopback fleet without a match hashes the whole
    checkpoint, and stores the manifest for other processes.

    Args:
        fleet: whose manifests are searched.
        checkpoint: the model.
        own_names: names of the tensors that this side loads; only these are hashed.
        command: makes the manifest, for messages.

    Raises:
        KeysError: a configured fleet has no manifest with this config.json.
        TensorMismatch: it has one, but a tensor differs.
        ModelError: the checkpoint is malformed.
    """
    digests = checkpoint.digest(own_names)
    try:
        return _matching(fleet, checkpoint, digests, command)
    except (KeysError, TensorMismatch):
        if not fleet.is_loopback:
            raise
    with fleet.locked():
        try:
            return _matching(fleet, checkpoint, digests, command)
        except (KeysError, TensorMismatch):
            manifest = build_manifest(checkpoint)
            fleet.add_manifest(manifest)
    manifest.check(digests)
    return manifest


def _matching(fleet: Fleet, checkpoint: Checkpoint, digests: dict[str, bytes], command: str) -> Manifest:
    same_config = [found for found in fleet.manifests() if found.config == checkpoint.config_sha256]
    same_config.sort(key=lambda found: found.name != checkpoint.name)
    mismatch: TensorMismatch | None = None
    for manifest in same_config:
        try:
            manifest.check(digests)
        except TensorMismatch as error:
            mismatch = mismatch or error
        else:
            return manifest
    raise mismatch or KeysError(
        f"no manifest of {checkpoint.name} (with this configuration) in {fleet.path}; run `{command}` there"
    )
