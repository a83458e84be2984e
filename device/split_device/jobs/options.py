"""Options that the commands of jobs share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.options import resolve_model
from split_common.errors import ConfigError

STORE_PANEL = "Jobs"

StoreKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--store-key",
        metavar="FILE",
        envvar="LAMBDA_SPLIT_STORE_KEY",
        rich_help_panel=STORE_PANEL,
        help="Seals prompts and answers on the disk under the key in this file. Made with the first job, and "
        "needed ever after.",
    ),
]
ConcurrencyOption = Annotated[
    int,
    typer.Option(
        "--max-jobs", min=1, max=4096, metavar="N", rich_help_panel=STORE_PANEL, help="Jobs that run at once."
    ),
]
MaxImagesOption = Annotated[
    int,
    typer.Option(
        "--max-images",
        min=1,
        max=64,
        metavar="N",
        rich_help_panel=STORE_PANEL,
        help="Images that are made at once.",
    ),
]
KvMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--kv-memory",
        metavar="SIZE",
        rich_help_panel=STORE_PANEL,
        help="For the keys and values of each model's head and tail. Default: 1GiB.",
    ),
]
GiveUpOption = Annotated[
    float,
    typer.Option(
        "--give-up",
        min=0.0,
        metavar="SECONDS",
        rich_help_panel=STORE_PANEL,
        help="To try again while there is no broker or no worker; then jobs fail.",
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        metavar="AGE",
        rich_help_panel=STORE_PANEL,
        help="Remove jobs that ended so long ago: 12h, 7d. Default: `jobs prune` does.",
    ),
]

#: Default of `--give-up`, in seconds.
GIVE_UP = 3600.0

#: Seconds in the units of an age.
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_age(text: str) -> int:
    """Seconds of an age like `90s`, `30m`, `12h` or `7d`. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text.strip(), re.ASCII)
    if not match:
        raise ConfigError(f"{text!r} is no age: write it like 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def checkpoint(model: str | None) -> str:
    """The checkpoint for a job, which another process in another directory will load. Raises ModelError."""
    name = resolve_model(model)
    return str(Path(name).resolve()) if Path(name).is_dir() else name
