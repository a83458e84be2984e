"""A safetensors checkpoint, local or on the Hugging Face hub, read without torch.

Format: https://huggingface.co/docs/safetensors/index#format (a u64 length, a JSON header, the tensors).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, NamedTuple

import msgspec
from msgspec import Meta, Struct

from split_common.errors import MissingTensor, ModelError, UnknownModel
from split_common.models.checkpoint_files import (
    decode_config,
    directory_name,
    hub_files,
    local_files,
    model_name,
    refuse_pointer,
)
from split_common.models.gguf_header import is_gguf, read_gguf_header
from split_common.models.torchao_parts import torchao_parts
from split_common.system.files import is_there, user_path

#: Called with the number of bytes just hashed, from several threads.
HashProgress = Callable[[int], None]

#: The largest safetensors header that is read, in bytes (the limit of the format's own library).
MAX_SAFETENSORS_HEADER: Final = 100_000_000
#: Bytes of a tensor that are read and hashed at a time.
HASHED_BYTES: Final = 4 << 20

_CONFIG = "config.json"
#: Stems of the tensors' file: that of transformers, and that of diffusers.
_WEIGHTS = ("model", "diffusion_pytorch_model")
#: Variants of the tensors' file, by the name that diffusers gives them; None is the file without a variant.
_VARIANTS: Final = (None, "fp16")
#: The file that lists the components of a diffusers pipeline, and the names that its denoiser may have there.
_PIPELINE, _DENOISERS = "model_index.json", ("unet", "transformer")
#: Names an IP-Adapter's file among the files of a checkpoint, whatever it is called on disk.
_ADAPTER = "IP-Adapter"
#: Weights in pickle format, which are not loaded.
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
#: Bits per element of each dtype of the format.
_BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_Natural = Annotated[int, Meta(ge=0)]


class TensorEntry(NamedTuple):
    """Where a tensor lies: bytes [begin, end) of `file` hold `shape` elements of `dtype` in C order.

    If it is a part of a torchao tensor, `whole` names that one, and `description` is the JSON that says how it is
    put together.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    whole: str = ""
    description: str = ""


class Checkpoint:
    """A model's configuration and tensors, found by `Checkpoint.resolve`.

    Args:
        name: the hub id, or that of the directory.
        revision: of a hub checkpoint; None if none was named, or for a directory.
        fetch: returns the local path of a file of the checkpoint. Raises FileNotFoundError if it has no such file.
        ip_adapter: the safetensors file of an IP-Adapter.
        gguf: the GGUF file that holds configuration and tensors.

    Raises:
        UnknownModel: it has no config.json, or no tensors in safetensors format.
        ModelError: a file is malformed.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        fetch: Callable[[str], Path],
        ip_adapter: Path | None = None,
        gguf: Path | None = None,
    ) -> None:
        #: The checkpoint's name, with the adapter's if it has one.
        self.name = name if ip_adapter is None else f"{name}+{ip_adapter.stem}"
        self.revision = revision
        self._fetch = functools.cache(fetch)
        self._adapter = ip_adapter
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        #: The GGUF file that takes the place of config.json and all others; None for safetensors.
        self.gguf = gguf
        #: The content of config.json, or all but the tensors of a GGUF file.
        self.config_bytes = self._config()
        #: "fp16" if the tensors are only in files of that name.
        self.variant: str | None = None
        #: The file that holds each tensor, by the tensor's name.
        self.files = self._weight_map()
        #: Names of an IP-Adapter's tensors.
        self.adapter_names = self._add_adapter() if ip_adapter is not None else frozenset[str]()

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, revision={self.revision!r})"

    @classmethod
    def resolve(
        cls, name_or_path: str | Path, revision: str | None = None, ip_adapter: str | Path | None = None
    ) -> Checkpoint:
        """Finds a checkpoint in a directory, in a GGUF file, or on the hub.

        A directory with a diffusers pipeline gives the denoiser's checkpoint, under the pipeline's name. Of a
        sharded hub checkpoint, only config.json and the index are fetched here.

        Args:
            name_or_path: the directory, the GGUF file, or a hub id.
            revision: a branch, tag or commit of the hub; None for the default branch.
            ip_adapter: the safetensors file of an IP-Adapter, whose tensors become part of the checkpoint.

        Raises:
            UnknownModel: there is no checkpoint in safetensors format, and no GGUF file.
            ModelError: it is malformed.
            ConfigError: the name is a path that cannot be looked at.
        """
        text = str(name_or_path)
        directory = user_path(name_or_path)
        is_there(directory)
        adapter = user_path(ip_adapter) if ip_adapter is not None else None
        if adapter is not None and not adapter.is_file():
            raise UnknownModel(f"{adapter} is not a file: give an IP-Adapter's .safetensors file")
        if adapter is not None:
            refuse_pointer(adapter)
        if directory.is_dir():
            return cls(directory_name(directory), None, local_files(_denoiser(directory)), adapter)
        if is_gguf(directory):
            if adapter is not None:
                raise UnknownModel(f"{adapter} is for image models, which {directory.name} is not")
            return cls(model_name(text), None, local_files(directory.parent), gguf=directory)
        if directory.exists() or not _HUB_ID.fullmatch(text):
            raise UnknownModel(
                f"{text!r} is neither a directory with a checkpoint, nor a .gguf file, nor the id of a hub model"
            )
        return cls(text, revision, hub_files(text, revision), adapter)

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, decoded at each call; empty for GGUF. Raises ModelError if malformed."""
        if self.gguf is not None:
            return {}
        return decode_config(self.name, self.config_bytes)

    @property
    def class_name(self) -> str | None:
        """The diffusers class that config.json names; None for models of other libraries. Raises as `config`."""
        name = self.config.get("_class_name")
        return name if isinstance(name, str) else None

    @functools.cached_property
    def config_sha256(self) -> bytes:
        """SHA-256 of config.json and of whether there is an IP-Adapter, 32 bytes."""
        return hashlib.sha256(self.config_bytes + (b"\0IP-Adapter" if self.adapter_names else b"")).digest()

    @property
    def tensor_names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self.files)

    def find(self, file: str) -> Path | None:
        """The local path of a file, which is downloaded if need be; None if there is none. Raises as `path`."""
        try:
            return self._fetch(file)
        except FileNotFoundError:
            return None

    def path(self, file: str) -> Path:
        """The local path of a file, which is downloaded if need be. Raises ModelError if it cannot be read."""
        if file == _ADAPTER and self._adapter is not None:
            return self._adapter
        try:
            return self._fetch(file)
        except FileNotFoundError as error:
            raise ModelError(f"{self.name}: {file} is missing: {error}") from None

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies.

        Raises:
            MissingTensor: the checkpoint has no tensor of this name.
            ModelError: the file that holds it is missing or malformed.
        """
        file = self.files.get(name)
        if file is None:
            raise MissingTensor(f"{self.name} has no tensor {name!r}")
        entry = self._header(file).get(name)
        if entry is None:
            raise MissingTensor(f"{self.name}: {file} lacks tensor {name!r}, which the index says it holds")
        return entry

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of all these tensors. Raises what `entry` raises."""
        return sum(entry.end - entry.begin for entry in map(self.entry, names))

    def digest(self, names: Iterable[str], progress: HashProgress | None = None) -> dict[str, bytes]:
        """SHA-256 of each tensor's dtype, shape as compact JSON, description and raw bytes; 32 bytes each.

        Tensors are hashed in parallel, because hashlib and file reads release the GIL.

        Args:
            names: of the tensors.
            progress: called with the number of bytes just hashed, from several threads.

        Raises:
            MissingTensor: the checkpoint has no tensor of such a name.
            ModelError: a file is missing or malformed, or ends early.
        """
        entries = {name: self.entry(name) for name in names}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            hashes = pool.map(lambda entry: self._hash(entry, progress), entries.values())
            return dict(zip(entries, hashes, strict=True))

    def _hash(self, entry: TensorEntry, progress: HashProgress | None) -> bytes:
        state = hashlib.sha256(entry.dtype.encode() + msgspec.json.encode(entry.shape) + entry.description.encode())
        left = entry.end - entry.begin
        buffer = memoryview(bytearray(min(HASHED_BYTES, left)))
        with self.path(entry.file).open("rb", buffering=0) as file:
            file.seek(entry.begin)
            while left:
                count = file.readinto(buffer[: min(HASHED_BYTES, left)])
                if not count:
                    raise ModelError(f"{self.name}: {entry.file} became shorter while it was read")
                state.update(buffer[:count])
                left -= count
                if progress is not None:
                    progress(count)
        return state.digest()

    def _config(self) -> bytes:
        if self.gguf is not None:
            refuse_pointer(self.gguf)
            header = read_gguf_header(self.gguf)
            self._headers[self.gguf.name] = {
                name: TensorEntry(self.gguf.name, *tensor) for name, tensor in header.tensors.items()
            }
            return header.content
        try:
            return self._fetch(_CONFIG).read_bytes()
        except FileNotFoundError as error:
            raise UnknownModel(
                f"no model {self.name!r} ({error}): does the path exist, is it a hub id, are you offline?"
            ) from None

    def _weight_map(self) -> dict[str, str]:
        """The file of each tensor. Like transformers, prefers a single file to an index, and both to variants."""
        if self.gguf is not None:
            return self._single(self.gguf)
        for variant, name in itertools.product(_VARIANTS, _WEIGHTS):
            single = f"{name}.{variant}.safetensors" if variant else f"{name}.safetensors"
            index = f"{name}.safetensors.index.{variant}.json" if variant else f"{name}.safetensors.index.json"
            for file, read in ((single, self._single), (index, self._index)):
                try:
                    path = self._fetch(file)
                except FileNotFoundError:
                    continue
                self.variant = variant
                return read(path)
        for file in _PICKLED:
            try:
                self._fetch(file)
            except FileNotFoundError:
                continue
            raise UnknownModel(f"{self.name} has only .bin weights; convert them to safetensors first")
        raise UnknownModel(f"{self.name} has neither {_WEIGHTS[0]}.safetensors nor an index of shards")

    def _add_adapter(self) -> frozenset[str]:
        own = self._header(_ADAPTER)
        if not any(name.startswith("ip_adapter.") for name in own) or own.keys() & self.files.keys():
            raise UnknownModel(f"{self._adapter} holds no IP-Adapter for {self.name}")
        self.files |= dict.fromkeys(own, _ADAPTER)
        return frozenset(own)

    def _single(self, path: Path) -> dict[str, str]:
        return dict.fromkeys(self._header(path.name), path.name)

    def _index(self, path: Path) -> dict[str, str]:
        try:
            files = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(f"{self.name}: {path.name} is malformed: {error}") from None
        for file in set(files.values()):
            if not _SHARD.fullmatch(file):
                raise ModelError(f"{self.name}: {path.name} names {file!r}, which is not a plain .safetensors file")
        return files

    def _header(self, file: str) -> dict[str, TensorEntry]:
        if file not in self._headers:
            try:
                with self.path(file).open("rb") as stream:
                    self._headers[file] = _read_header(file, stream)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                raise ModelError(f"{self.name}: {file} is malformed: {error}") from None
        return self._headers[file]


class _Index(Struct):
    weight_map: dict[str, str]


class _RawEntry(Struct):
    dtype: str
    shape: Annotated[tuple[_Natural, ...], Meta(max_length=64)]
    data_offsets: tuple[_Natural, _Natural]


def _read_header(file: str, stream: BinaryIO) -> dict[str, TensorEntry]:
    """All entries of a safetensors file.

    The tensors must tile the data without gap or overlap, as the format demands. Every reader of the format then
    finds the same bytes under a name.

    Raises:
        ValueError, MsgspecError: the header is malformed, or contradicts the file's size.
    """
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(MAX_SAFETENSORS_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    fields = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])
    wholes = torchao_parts(fields.pop("__metadata__", msgspec.Raw(b"{}")))
    start = 8 + length
    entries = {}
    for name, content in fields.items():
        raw = msgspec.json.decode(content, type=_RawEntry)
        begin, end = raw.data_offsets
        if raw.dtype not in _BITS:
            raise ValueError(f"tensor {name!r} has unknown dtype {raw.dtype!r}")
        if (end - begin) * 8 != math.prod(raw.shape) * _BITS[raw.dtype]:
            raise ValueError(f"tensor {name!r} has {end - begin} bytes, which its dtype and shape contradict")
        entries[name] = TensorEntry(file, raw.dtype, raw.shape, start + begin, start + end, *wholes.get(name, ()))
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise ValueError("its tensors overlap or leave gaps")
        position = entry.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")
    return entries


def _denoiser(directory: Path) -> Path:
    """The denoiser's directory if this is a pipeline's; else this one."""
    index = directory / _PIPELINE
    if not index.is_file():
        return directory
    refuse_pointer(index)
    try:
        parts = msgspec.json.decode(index.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{directory.name}: {_PIPELINE} is malformed: {error}") from None
    for part in _DENOISERS:
        match parts.get(part):
            case [str(), str()]:
                return directory / part
    raise UnknownModel(f"{directory.name}: {_PIPELINE} names none of {', '.join(_DENOISERS)}")
