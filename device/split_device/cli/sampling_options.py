"""Options that adjust how tokens are chosen, beside temperature, top_p and top_k."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from split_common.errors import ConfigError
from split_device.cli.options import SAMPLING_PANEL
from split_device.generation.settings import BOUNDS, check_bias

#: Options by the fields of `Sampling` that they set.
ADJUSTMENTS = {
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
    "frequency_penalty": "--frequency-penalty",
    "presence_penalty": "--presence-penalty",
    "logit_bias": "--logit-bias",
    "min_tokens": "--min-tokens",
    "stop_token_ids": "--stop-token-id",
    "ignore_eos": "--ignore-eos",
    "bad_words": "--bad-word",
}


def parse_bias(text: str) -> dict[int, float] | None:
    """Biases as a JSON object, like `{"50256": -100}`. Raises ConfigError."""
    try:
        given = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeEncodeError):
        raise ConfigError(f'invalid logit_bias {text!r}: expected a JSON object like {{"50256": -100}}') from None
    return check_bias(given)


def _number(name: str, metavar: str, default: str, help: str) -> Any:
    low, high, _ = BOUNDS[name]
    return typer.Option(
        ADJUSTMENTS[name],
        min=low,
        max=high,
        metavar=metavar,
        show_default=default,
        rich_help_panel=SAMPLING_PANEL,
        help=help,
    )


MinPOption = Annotated[
    float | None,
    _number(
        "min_p",
        "P",
        "the checkpoint's, else 0",
        "Sample among tokens whose probability is at least P times that of the most likely one.",
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    _number(
        "repetition_penalty",
        "R",
        "the checkpoint's, else 1",
        "Make tokens that occur in the prompt or the answer less likely; a value below 1 makes them more likely.",
    ),
]
FrequencyPenaltyOption = Annotated[
    float | None,
    _number(
        "frequency_penalty",
        "F",
        "0",
        "Make a token less likely each time it occurs in the answer; a value below 0 makes it more likely.",
    ),
]
PresencePenaltyOption = Annotated[
    float | None,
    _number(
        "presence_penalty",
        "F",
        "0",
        "Make tokens that occur in the answer at all less likely; a value below 0 makes them more likely.",
    ),
]
LogitBiasOption = Annotated[
    dict | None,  # type: ignore[type-arg]
    typer.Option(
        "--logit-bias",
        metavar="JSON",
        parser=parse_bias,
        rich_help_panel=SAMPLING_PANEL,
        help="Values to add to the logits, by token id, each from -100 to 100: '{\"50256\": -100}'.",
    ),
]
MinTokensOption = Annotated[
    int | None,
    typer.Option(
        "--min-tokens",
        min=0,
        metavar="N",
        show_default="the checkpoint's, else 0",
        help="Minimum number of tokens before the answer may end.",
    ),
]
StopTokenIdsOption = Annotated[
    list[int] | None,
    typer.Option("--stop-token-id", min=0, metavar="ID", help="End at this token, too. May be repeated."),
]
IgnoreEosOption = Annotated[
    bool | None,
    typer.Option("--ignore-eos", show_default=False, help="Go on after the model's own end tokens."),
]
BadWordsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bad-word",
        metavar="TEXT",
        rich_help_panel=SAMPLING_PANEL,
        help="Never write this text as a word of its own. May be repeated.",
    ),
]
