"""Model manifests: the SHA-256 of every tensor of a checkpoint."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from split_common.errors import TensorMismatch
from split_common.trust.keys import Bytes32

#: A model's name in its fleet: 1 to 96 characters, as hub ids have them.
ModelName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._@+/-]{1,96}\Z")]


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """What a checkpoint holds: the SHA-256 of its config.json and of each tensor (`Checkpoint.digest`)."""

    name: ModelName
    config: Bytes32
    tensors: dict[str, Bytes32]
    version: Literal[1] = 1

    @cached_property
    def root(self) -> bytes:
        """SHA-256 (32 bytes) that stands for the config and all tensors; the name does not count."""
        content = msgspec.msgpack.encode((self.version, self.config, sorted(self.tensors.items())))
        return hashlib.sha256(b"lambda-split manifest root\0" + content).digest()

    def check(self, digests: dict[str, bytes]) -> None:
        """Raise `TensorMismatch` naming the first of these tensors that differs or is not listed."""
        for name, digest in digests.items():
            if name not in self.tensors:
                raise TensorMismatch(f"the manifest of {self.name} lists no tensor {name!r}")
            if self.tensors[name] != digest:
                raise TensorMismatch(f"tensor {name!r} differs from the manifest of {self.name}")
