"""The files of a batch's pictures: their names, and how they are written as they are made."""

from __future__ import annotations

import io
import re
from pathlib import Path

from split_device.batches.plan import Plan
from split_device.images.files import write_image
from split_device.jobs.job import Selection
from split_device.jobs.store import Store

#: An id that is a file's name as it is. Others are put behind the line's number, with underscores for the rest.
_PLAIN = re.compile(r"[A-Za-z_][\w.-]{0,79}", re.ASCII)
_UNSAFE = re.compile(r"[^\w.-]", re.ASCII)

#: Longest part of a file's name that comes from an id, in characters.
MAX_NAME = 80

#: A number in a file's name has this number of digits, so that files sort as lines do.
DIGITS = 5


def file_names(name: str | None, number: int, count: int, format_: str) -> tuple[str, ...]:
    """Names of a line's pictures, which differ from those of any other line.

    Args:
        name: the line's own id, if it has one.
        number: the line's number.
        count: how many pictures it asks for.
        format_: png, jpeg or webp.
    """
    suffix = ".jpg" if format_ == "jpeg" else f".{format_}"
    if count == 1 and name is not None and _PLAIN.fullmatch(name):
        return (f"{name}{suffix}",)
    stem = f"{number:0{DIGITS}}"
    if name is not None and name != str(number):
        stem += f"-{_UNSAFE.sub('_', name)[:MAX_NAME]}"
    stems = [stem] if count == 1 else [f"{stem}-{choice}" for choice in range(1, count + 1)]
    return tuple(f"{each}{suffix}" for each in stems)


class Pictures:
    """Writes a batch's pictures to a directory, each once.

    Args:
        directory: exists.
    """

    def __init__(self, directory: Path, plan: Plan, store: Store) -> None:
        self._directory = directory
        self._store = store
        #: By the id of its job: the picture's file, and whether it carries its settings.
        self._missing = {
            job: (directory / file, entry.metadata)
            for entry in plan.entries()
            for job, file in zip(entry.jobs, entry.files, strict=False)
        }

    def write(self) -> None:
        """Writes the pictures that have been made since the last call. Raises ConfigError."""
        from PIL import Image

        for id_ in self._store.ids(Selection(states=("succeeded",))) if self._missing else ():
            if id_ in self._missing:
                path, metadata = self._missing[id_]
                with Image.open(io.BytesIO(self._store.image(id_))) as image:
                    write_image(image, path, metadata=metadata)
                del self._missing[id_]


def clashes(directory: Path, plan: Plan) -> Path | None:
    """A file in the directory that a picture would replace, or None."""
    found = (directory / file for entry in plan.entries() for file in entry.files)
    return next((path for path in found if path.exists()), None)
