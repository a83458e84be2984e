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

#: Called with the number of bytes just hashed, from several threads.
HashProgress = Callable[[int], None]

#: The largest safetensors header that is read, in bytes (the limit of the format's own library).
MAX_SAFETENSORS_HEADER: Final = 100_000_000
#: How much of a tensor is read and hashed at a time, in bytes.
CHUNK: Final = 4 << 20

_CONFIG = "config.json"
#: The tensors' file, of transformers and of diffusers, and variants of it, by the name that diffusers gives them;
#: the index of a sharded checkpoint is called otherwise.
_WEIGHTS = ("model", "diffusion_pytorch_model")
_VARIANTS: Final = (None, "fp16")
#: A pipeline of diffusers has this file, which names its parts; the denoiser is one of these.
_PIPELINE, _DENOISERS = "model_index.json", ("unet", "transformer")
#: Stands for an IP-Adapter's file among those of a checkpoint.
_ADAPTER = "IP-Adapter"
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
    """Where a tensor lies: bytes [begin, end) of `file` hold `shape` elements of `dtype` in C order."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """A model's configuration and tensors, found by `Checkpoint.resolve`.

    Attributes: `name` (the hub id, or the directory's name), `revision` (of a hub checkpoint, or None),
    `config_bytes` (of config.json as it is), `files` (from a tensor's name to the file that holds it), `variant`
    (None, or "fp16" where there are only files of that name), `adapter_names` (of an IP-Adapter's tensors).
    """

    def __init__(
        self, name: str, revision: str | None, fetch: Callable[[str], Path], ip_adapter: Path | None = None
    ) -> None:
        """`fetch(file)` returns the local path of one of its files, or raises FileNotFoundError."""
        self.name = name if ip_adapter is None else f"{name}+{ip_adapter.stem}"
        self.revision = revision
        self._fetch = functools.cache(fetch)
        self._adapter = ip_adapter
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self.config_bytes = self._config()
        self.variant: str | None = None
        self.files = self._weight_map()
        self.adapter_names = self._add_adapter() if ip_adapter is not None else frozenset[str]()

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, revision={self.revision!r})"

    @classmethod
    def resolve(
        cls, name_or_path: str | Path, revision: str | None = None, ip_adapter: str | Path | None = None
    ) -> Checkpoint:
        """The checkpoint in a directory, else that of a hub id at `revision` (a branch, tag or commit).

        Of a directory with a diffusers pipeline it is the denoiser's, under the pipeline's name. Of a sharded hub
        checkpoint only config.json and the index are fetched here. With the safetensors file of an IP-Adapter it
        is a checkpoint of its own, which has the adapter's tensors, too. Raises `UnknownModel`
        where there is none in safetensors format, `ModelError` where it is malformed.
        """
        text = str(name_or_path)
        directory = Path(name_or_path).expanduser()
        adapter = Path(ip_adapter).expanduser() if ip_adapter is not None else None
        if adapter is not None and not adapter.is_file():
            raise UnknownModel(f"{adapter} is not a file: give an IP-Adapter's .safetensors file")
        if directory.is_dir():
            return cls(directory.resolve().name, None, _local(_denoiser(directory)), adapter)
        if directory.exists() or not _HUB_ID.fullmatch(text):
            raise UnknownModel(f"{text!r} is neither a directory with a checkpoint nor the id of a hub model")
        return cls(text, revision, _hub(text, revision), adapter)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says, decoded anew with each call. Raises `ModelError` where it is malformed."""
        try:
            return msgspec.json.decode(self.config_bytes, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(f"{self.name}: config.json is malformed: {error}") from None

    @property
    def class_name(self) -> str | None:
        """The class of diffusers that config.json names; None for other libraries' models. Raises as `config`."""
        name = self.config.get("_class_name")
        return name if isinstance(name, str) else None

    @functools.cached_property
    def config_sha256(self) -> bytes:
        """SHA-256 of config.json, and of whether there is an adapter: 32 bytes."""
        return hashlib.sha256(self.config_bytes + (b"\0IP-Adapter" if self.adapter_names else b"")).digest()

    @property
    def tensor_names(self) -> list[str]:
        """All tensors' names, sorted."""
        return sorted(self.files)

    def path(self, file: str) -> Path:
        """The local path of one of the checkpoint's files, downloaded first if need be."""
        if file == _ADAPTER and self._adapter is not None:
            return self._adapter
        try:
            return self._fetch(file)
        except FileNotFoundError as error:
            raise ModelError(f"{self.name}: {file} is missing: {error}") from None

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor lies.

        Raises `MissingTensor` where there is none of this name, `ModelError` where its file is malformed.
        """
        file = self.files.get(name)
        if file is None:
            raise MissingTensor(f"{self.name} has no tensor {name!r}")
        entry = self._header(file).get(name)
        if entry is None:
            raise MissingTensor(f"{self.name}: {file} lacks tensor {name!r}, which the index says it holds")
        return entry

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of these tensors together; errors as of `entry`."""
        return sum(entry.end - entry.begin for entry in map(self.entry, names))

    def digest(self, names: Iterable[str], progress: HashProgress | None = None) -> dict[str, bytes]:
        """SHA-256 (32 bytes) of each tensor: of its dtype, its shape as compact JSON, and its raw bytes.

        Tensors are hashed in parallel (hashlib and file reads release the GIL). Raises as `entry`, and
        `ModelError` where a file ends early.
        """
        entries = {name: self.entry(name) for name in names}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            hashes = pool.map(lambda entry: self._hash(entry, progress), entries.values())
            return dict(zip(entries, hashes, strict=True))

    def _hash(self, entry: TensorEntry, progress: HashProgress | None) -> bytes:
        state = hashlib.sha256(entry.dtype.encode() + msgspec.json.encode(entry.shape))
        left = entry.end - entry.begin
        buffer = memoryview(bytearray(min(CHUNK, left)))
        with self.path(entry.file).open("rb", buffering=0) as file:
            file.seek(entry.begin)
            while left:
                count = file.readinto(buffer[: min(CHUNK, left)])
                if not count:
                    raise ModelError(f"{self.name}: {entry.file} became shorter while it was read")
                state.update(buffer[:count])
                left -= count
                if progress is not None:
                    progress(count)
        return state.digest()

    def _config(self) -> bytes:
        try:
            return self._fetch(_CONFIG).read_bytes()
        except FileNotFoundError as error:
            raise UnknownModel(
                f"no model {self.name!r} ({error}): does the path exist, is it a hub id, are you offline?"
            ) from None

    def _weight_map(self) -> dict[str, str]:
        """The single file is preferred to the index, as transformers does; and both to variants."""
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
        raise UnknownModel(f"{self.name} has neither {_WEIGHTS[0]}.safetensors nor its index")

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
    """All entries of a safetensors file; ValueError or MsgspecError where the header lies.

    The tensors must tile the data without gap or overlap, as the format demands: no reader of it can then
    find other bytes under a name than this one.
    """
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(MAX_SAFETENSORS_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    fields = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])
    fields.pop("__metadata__", None)
    start = 8 + length
    entries = {}
    for name, field in fields.items():
        raw = msgspec.json.decode(field, type=_RawEntry)
        begin, end = raw.data_offsets
        if raw.dtype not in _BITS:
            raise ValueError(f"tensor {name!r} has unknown dtype {raw.dtype!r}")
        if (end - begin) * 8 != math.prod(raw.shape) * _BITS[raw.dtype]:
            raise ValueError(f"tensor {name!r} has {end - begin} bytes, which its dtype and shape contradict")
        entries[name] = TensorEntry(file, raw.dtype, raw.shape, start + begin, start + end)
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise ValueError("its tensors overlap or leave gaps")
        position = entry.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")
    return entries


def _denoiser(directory: Path) -> Path:
    """The directory of the denoiser, if this is a pipeline's."""
    index = directory / _PIPELINE
    if not index.is_file():
        return directory
    try:
        parts = msgspec.json.decode(index.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{directory.name}: {_PIPELINE} is malformed: {error}") from None
    for part in _DENOISERS:
        match parts.get(part):
            case [str(), str()]:
                return directory / part
    raise UnknownModel(f"{directory.name}: {_PIPELINE} names none of {', '.join(_DENOISERS)}")


def _local(directory: Path) -> Callable[[str], Path]:
    def fetch(file: str) -> Path:
        path = directory / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return path

    return fetch


def _hub(repo: str, revision: str | None) -> Callable[[str], Path]:
    """`HF_HUB_OFFLINE` is honoured by huggingface_hub, which then finds only what is cached."""

    def fetch(file: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except LocalEntryNotFoundError:
            raise FileNotFoundError(f"{file} is not cached, and the hub cannot be reached") from None
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
            raise FileNotFoundError(f"the hub has no {file} for us: {type(error).__name__}") from None

    return fetch
