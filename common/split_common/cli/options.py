"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from split_common.errors import ConfigError
from split_common.transport import DEFAULT_BROKER

#: Headings in a command's help.
MODEL_PANEL = "Model"
QUEUE_PANEL = "Queue and keys"

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        rich_help_panel=QUEUE_PANEL,
        help="The fleet's directory. Default: $LAMBDA_SPLIT_KEYS, else `keys` in the settings directory, else "
        "keys that are made for this machine's loopback alone.",
    ),
]
FleetOption = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        rich_help_panel=QUEUE_PANEL,
        help="The fleet's directory. Default: $LAMBDA_SPLIT_KEYS, else `keys` in the settings directory.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on one line of stdout, and nothing else there.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        envvar="LAMBDA_SPLIT_MODEL",
        rich_help_panel=MODEL_PANEL,
        help="Directory or hub id of a safetensors checkpoint. Default: SmolLM2-135M-Instruct, fetched once.",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(metavar="REVISION", rich_help_panel=MODEL_PANEL, help="Branch, tag or commit of a hub id."),
]
IpAdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--ip-adapter",
        metavar="FILE",
        rich_help_panel=MODEL_PANEL,
        help="Of a diffusion model: an IP-Adapter's .safetensors file. With it, it is a model of its own.",
    ),
]
BrokerOption = Annotated[
    str,
    typer.Option(
        "--broker",
        metavar="ADDRESS",
        envvar="LAMBDA_SPLIT_BROKER",
        rich_help_panel=QUEUE_PANEL,
        help="The queue: tcp://HOST:PORT, zmq://HOST:PORT or ipc://PATH of a broker; or Redis or Valkey at "
        "redis://HOST:PORT, rediss://…, redis+sentinel://HOST:PORT,…/SERVICE or redis+cluster://HOST:PORT,….",
    ),
]
MemberOption = Annotated[
    str | None,
    typer.Option(
        "--member",
        metavar="NAME",
        rich_help_panel=QUEUE_PANEL,
        help="This member's name, if the keys of several lie in the directory.",
    ),
]
TimeoutOption = Annotated[
    float, typer.Option(min=0.1, metavar="SECONDS", rich_help_panel=QUEUE_PANEL, help="To wait for the broker.")
]
DtypeOption = Annotated[
    DtypeName,
    typer.Option(rich_help_panel=MODEL_PANEL, help="Of weights and hidden states; auto takes the checkpoint's."),
]

__all__ = ["DEFAULT_BROKER"]


def resolve_model(model: str | None) -> str:
    """The checkpoint to use; the demo model where none is named. Raises ModelError."""
    if model is not None:
        return model
    from split_common.demo_model import ensure_demo_model

    return str(ensure_demo_model())


def parse_size(text: str) -> int:
    """Bytes of a size like `4GiB`, `512MiB` or `1000000`. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ConfigError(f"{text!r} is no size: write it like 4GiB or 512MiB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def given(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of these parameters that stand on the command line, as options are written."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]
