"""Where the tensors of a GGUF file lie (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from split_common.errors import ModelError


class GgufTensor(NamedTuple):
    """Bytes [begin, end) of the file hold a tensor of `shape`, in the order of torch, in blocks of a type."""

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufHeader(NamedTuple):
    """What precedes the tensors in a GGUF file, as it is, and where each tensor lies, by its name."""

    content: bytes
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix == ".gguf" and path.is_file()


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads all but the tensors of a GGUF file, with the package that later reads the tensors, too.

    Raises:
        ModelError: the package `gguf` is not installed, or the file is malformed, or one part of several.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"reading {path.name} needs gguf: pip install 'lambda-split[gguf]'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        parts = reader.get_field("split.count")
        several = parts is not None and parts.contents() > 1
        tensors = {
            tensor.name: GgufTensor(
                tensor.tensor_type.name,
                tuple(int(size) for size in reversed(tensor.shape)),
                int(tensor.data_offset),
                int(tensor.data_offset + tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
        content = bytes(reader.data[: reader.data_offset])
    except Exception as error:
        # The reader raises whatever numpy does.
        raise ModelError(f"{path.name} is not a GGUF file, or a malformed one: {error}") from None
    if several:
        raise ModelError(f"{path.name} is one part of several: join them by `llama-gguf-split --merge`")
    return GgufHeader(content, tensors)
