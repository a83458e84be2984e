"""Parses the lines of a file into those of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from split_common.errors import ConfigError
from split_device.batches.lines import Line, Names
from split_device.batches.openai_lines import openai_line
from split_device.batches.prompt_lines import Prompts
from split_device.batches.settings import BatchSettings
from split_device.batches.source import Source


def parsed(
    source: Source, settings: BatchSettings, pictures: bool, notice: Callable[[str], None]
) -> Iterator[Line]:
    """The lines, one after the other.

    Args:
        pictures: whether there is a directory for pictures.
        notice: called with what the user should know: fields that have no effect.

    Raises:
        ConfigError: there are none, a line asks for a picture and there is no directory, or an option does not fit.
    """
    count = 0
    if source.form == "openai":
        names = Names()
        for raw in source:
            line = openai_line(raw, settings, names)
            if line.entry.files and not pictures:
                raise ConfigError(f"line {raw.number} asks for an image: give --output-dir, where it is written")
            count += 1
            yield line
    else:
        prompts = Prompts(source, settings)
        for raw in source:
            count += 1
            yield prompts.line(raw)
        if prompts.unused:
            notice(f"fields without effect: {', '.join(sorted(prompts.unused))}")
    if not count:
        raise ConfigError(f"{source.name} has no lines")
