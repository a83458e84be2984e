"""Options that the commands of jobs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from split_common.options import resolve_model

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

#: Default of `--give-up`, in seconds.
GIVE_UP = 3600.0


def checkpoint(model: str | None) -> str:
    """The checkpoint for a job, which another process in another directory will load. Raises ModelError."""
    name = resolve_model(model)
    return str(Path(name).resolve()) if Path(name).is_dir() else name
