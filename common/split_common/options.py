"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from split_common.transport import DEFAULT_BROKER

KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        help="The fleet's directory. Default: $LAMBDA_SPLIT_KEYS, else `keys` in the settings directory.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on one line.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        envvar="LAMBDA_SPLIT_MODEL",
        help="Directory or hub id of a safetensors checkpoint. Default: SmolLM2-135M-Instruct, fetched once.",
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
BrokerOption = Annotated[
    str,
    typer.Option(
        "--broker",
        metavar="ADDRESS",
        envvar="LAMBDA_SPLIT_BROKER",
        help="Where the broker listens: tcp://HOST:PORT, zmq://HOST:PORT or ipc://PATH.",
    ),
]
MemberOption = Annotated[
    str | None, typer.Option("--member", help="This member's name, if the keys of several lie in the directory.")
]
TimeoutOption = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the broker.")]
DtypeOption = Annotated[
    str, typer.Option(help="Of weights and hidden states: auto (the checkpoint's), float32, bfloat16, float16.")
]

__all__ = ["DEFAULT_BROKER"]


def resolve_model(model: str | None) -> str:
    """The checkpoint to use; the demo model where none is named. Raises ModelError."""
    if model is not None:
        return model
    from split_common.demo_model import ensure_demo_model

    return str(ensure_demo_model())
