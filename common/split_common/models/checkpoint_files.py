"""Where a checkpoint's files are, in a directory or on the Hugging Face hub, and the name that it has there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from split_common.errors import ModelError
from split_common.models.gguf_header import is_gguf
from split_common.system.files import user_path

#: How a Git LFS pointer begins, the small text file in the place of a large one that was not fetched.
_POINTER: Final = b"version https://git-lfs.github.com/spec/"
#: A model's directory in the hub's cache, which holds a directory for each commit.
_CACHED: Final = re.compile(r"models--(?:(?P<owner>[\w.-]+?)--)?(?P<model>[\w.-]+)", re.ASCII)
#: What a tokenizer reads, as patterns. `*.model` is read only if there is no tokenizer.json.
_TOKENIZER: Final = ("*token*.json", "vocab*", "merges.txt", "chat_template*")
_SENTENCEPIECE: Final = ("*.model",)


def directory_name(directory: Path) -> str:
    """The name of a checkpoint in a directory: the directory's, or the hub's id for one of the hub's cache."""
    directory = directory.resolve()
    cached = _CACHED.fullmatch(directory.parent.parent.name) if directory.parent.name == "snapshots" else None
    if cached is None:
        return directory.name
    return "/".join(part for part in cached.groups() if part is not None)


def model_name(name_or_path: str) -> str:
    """The name by which people know a model: a hub id, a GGUF file's, or the `directory_name` of a directory."""
    directory = user_path(name_or_path)
    if is_gguf(directory):
        return directory.stem
    return directory_name(directory) if directory.is_dir() else name_or_path


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer. Raises ModelError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def refuse_pointer(path: Path) -> None:
    """Raises ModelError if a file is a Git LFS pointer, or cannot be read."""
    if is_pointer(path):
        raise ModelError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")


def refuse_odd_files(directory: Path, patterns: Iterable[str]) -> None:
    """Raises ModelError if a file of a directory that matches one of the patterns cannot be what its name says.

    That is as in `local_files`. Directories without a suffix have no file's name.
    """
    fetch = local_files(directory)
    for pattern in patterns:
        for path in sorted(directory.glob(pattern)):
            if path.suffix or not path.is_dir():
                fetch(path.name)


def decode_config(name: str, data: bytes) -> dict[str, Any]:
    """The content of a checkpoint's config.json. Raises ModelError if it is not a JSON object."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{name}: config.json is malformed: {error}") from None


def check_config(name_or_path: str) -> None:
    """Raises ModelError if a directory's config.json is malformed or a Git LFS pointer. Looks at nothing else."""
    path = user_path(name_or_path) / "config.json"
    if path.is_file():
        refuse_pointer(path)
        decode_config(model_name(name_or_path), path.read_bytes())


def check_tokenizer_files(directory: Path) -> None:
    """Raises ModelError if a file that the directory's tokenizer reads is a Git LFS pointer, a pipe or the like."""
    refuse_odd_files(directory, _TOKENIZER)
    if not (directory / "tokenizer.json").is_file():
        refuse_odd_files(directory, _SENTENCEPIECE)


def check_pipeline_files(directory: Path) -> None:
    """Raises ModelError if a file of a diffusers pipeline is a Git LFS pointer or no file, but for unused weights.

    The denoiser's own files are checked by `local_files`, and weights may lie beside a variant that was fetched.
    """
    for component in sorted(path for path in directory.iterdir() if path.is_dir() and path.name[0] != "."):
        refuse_odd_files(component, ("*.json", "*.txt"))
        if not (component / "tokenizer.json").is_file():
            refuse_odd_files(component, _SENTENCEPIECE)
        weights = [path for path in component.glob("*.safetensors") if path.is_file()]
        if weights and all(map(is_pointer, weights)):
            refuse_pointer(weights[0])


def local_files(directory: Path) -> Callable[[str], Path]:
    """A function that finds a file of a checkpoint in a directory.

    It raises FileNotFoundError if there is no such file, and ModelError if it cannot be what its name says: a link
    that leads nowhere, a directory, a pipe, or a Git LFS pointer.
    """

    def fetch(file: str) -> Path:
        path = directory / file
        if path.is_symlink() and not path.exists():
            raise ModelError(f"{path} is a link to {path.readlink()}, which does not exist")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if not path.is_file():
            raise ModelError(f"{path} is not a file")
        refuse_pointer(path)
        return path

    return fetch


def hub_files(repo: str, revision: str | None) -> Callable[[str], Path]:
    """Fetches files from the hub; with `HF_HUB_OFFLINE` set, huggingface_hub finds only those in its cache."""

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
            raise FileNotFoundError(f"the hub gives no {file}: {type(error).__name__}") from None

    return fetch
