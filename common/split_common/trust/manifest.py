"""Model manifests: the SHA-256 of every tensor of a checkpoint."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from split_common.errors import TensorMismatch
from split_common.trust.keys import Bytes32

#: A model's name in its fleet: 1 to 96 of the characters that hub ids consist of.
ModelName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._@+/-]{1,96}\Z")]


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The SHA-256 of a checkpoint's config.json and of each of its tensors (`Checkpoint.digest`)."""

    name: ModelName
    config: Bytes32
    tensors: dict[str, Bytes32]
    version: Literal[1] = 1

    @cached_property
    def root(self) -> bytes:
        """SHA-256 (32 bytes) of the config's and all tensors' digests, whatever the model's name."""
        content = msgspec.msgpack.encode((self.version, self.config, sorted(self.tensors.items())))
        return hashlib.sha256(b"lambda-split manifest root\0" + content).digest()

    def check(self, digests: dict[str, bytes]) -> None:
        """Compares digests of tensors, by name, with the manifest's.

        Raises:
            TensorMismatch: a tensor differs or is not listed; the message names the first one.
        """
        for name, digest in digests.items():
            if name not in self.tensors:
                raise TensorMismatch(f"the manifest of {self.name} lists no tensor {name!r}")
            if self.tensors[name] != digest:
                raise TensorMismatch(f"tensor {name!r} differs from the manifest of {self.name}")
