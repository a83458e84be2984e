"""Options that several of the device's commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from split_common.cli.options import MODEL_PANEL, QUEUE_PANEL

_SAMPLING = "Sampling"

HeadOption = Annotated[
    int,
    typer.Option(
        "--head-layers", min=0, metavar="N", rich_help_panel=MODEL_PANEL, help="Decoder layers before the body."
    ),
]
TailOption = Annotated[
    int,
    typer.Option(
        "--tail-layers", min=0, metavar="N", rich_help_panel=MODEL_PANEL, help="Decoder layers after the body."
    ),
]
MaxTokensOption = Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens to generate.")]
TemperatureOption = Annotated[
    float,
    typer.Option(min=0.0, metavar="T", rich_help_panel=_SAMPLING, help="0 always takes the likeliest token."),
]
TopPOption = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, metavar="P", rich_help_panel=_SAMPLING, help="Choose among the likeliest of this mass."
    ),
]
TopKOption = Annotated[
    int,
    typer.Option(min=0, metavar="K", rich_help_panel=_SAMPLING, help="Choose among so many likeliest; 0 for all."),
]
SeedOption = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=_SAMPLING, help="The same seed gives the same answer."),
]
SystemOption = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before the conversation.")]
TimingsOption = Annotated[
    bool, typer.Option("--timings", help="Print on stderr where the prompt's and each token's time went.")
]
PatienceOption = Annotated[
    float,
    typer.Option(
        min=0.0,
        metavar="SECONDS",
        rich_help_panel=QUEUE_PANEL,
        help="To wait while all workers are full, or none is left to take over.",
    ),
]
StepTimeoutOption = Annotated[
    float,
    typer.Option(
        "--step-timeout",
        min=1.0,
        metavar="SECONDS",
        rich_help_panel=QUEUE_PANEL,
        help="Without an answer before a worker is too slow, if there is another one.",
    ),
]
HistoryOption = Annotated[
    str,
    typer.Option(
        "--history-memory",
        metavar="SIZE",
        rich_help_panel=QUEUE_PANEL,
        help="Of what it takes to go on at another worker; more than that goes to an encrypted temporary file.",
    ),
]
