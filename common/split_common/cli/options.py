"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from split_common.errors import ConfigError

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
        "keys made for this machine's loopback only.",
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
    typer.Option(metavar="REVISION", rich_help_panel=MODEL_PANEL, help="Branch, tag or commit of a hub model."),
]
IpAdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--ip-adapter",
        metavar="FILE",
        rich_help_panel=MODEL_PANEL,
        help="An IP-Adapter's .safetensors file, for a diffusion model. The model then counts as a different one.",
    ),
]
BrokerOption = Annotated[
    str,
    typer.Option(
        "--broker",
        metavar="ADDRESS",
        envvar="LAMBDA_SPLIT_BROKER",
        rich_help_panel=QUEUE_PANEL,
        help="Address of the queue: tcp://HOST:PORT, zmq://HOST:PORT or ipc://PATH of a broker; or of Redis or "
        "Valkey, redis://HOST:PORT, rediss://…, redis+sentinel://HOST:PORT,…/SERVICE or redis+cluster://HOST:PORT,….",
    ),
]
MemberOption = Annotated[
    str | None,
    typer.Option(
        "--member",
        metavar="NAME",
        rich_help_panel=QUEUE_PANEL,
        help="This member's name, if the directory holds the keys of several.",
    ),
]
TimeoutOption = Annotated[
    float,
    typer.Option(min=0.1, metavar="SECONDS", rich_help_panel=QUEUE_PANEL, help="How long to wait for the broker."),
]
DtypeOption = Annotated[
    DtypeName,
    typer.Option(
        rich_help_panel=MODEL_PANEL, help="Data type of weights and hidden states; auto takes the checkpoint's."
    ),
]


def parse_size(size: str | int) -> int:
    """A size like `4GiB`, `512MiB` or `1000000`, in bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", str(size).strip(), re.IGNORECASE)
    if not match:
        raise ConfigError(f"invalid size {size!r}: expected a number of bytes, or e.g. 4GiB or 512MiB")
    number = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")
    if number >= 2**63:
        raise ConfigError(f"invalid size {size!r}: more bytes than 63 bits count")
    return int(number)


def given(context: typer.Context, options: Iterable[str]) -> list[str]:
    """The options, out of some like `--max-tokens`, that are on the command line."""
    names = {option: parameter.name for parameter in context.command.params for option in parameter.opts}
    return [option for option in options if _is_given(context, names[option])]


def given_words(context: typer.Context, but: Iterable[str] = ()) -> list[str]:
    """The options on the command line with their values, except those in `but`, to pass them to another command."""
    words = []
    for parameter in context.command.params:
        option = parameter.opts[0]
        if _is_given(context, parameter.name) and option not in but:
            words += [option, str(context.params[parameter.name or ""])]
    return words


def _is_given(context: typer.Context, name: str | None) -> bool:
    source = context.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"
