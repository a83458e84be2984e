"""Options that several commands of the device share: language models, the queue, and jobs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.options import MODEL_PANEL, PRIVACY_PANEL, QUEUE_PANEL, parse_cache_size, parse_size
from split_common.errors import ConfigError
from split_common.system.files import user_path
from split_device.generation.limits import PREFIX_CACHE
from split_device.generation.settings import BOUNDS
from split_device.models.compression import CODEC_NAMES, CODECS, OLD_EXACT, parse_codec
from split_device.sessions.connection import HISTORY_MEMORY
from split_device.sessions.identity import check_request_id
from split_device.speculation.names import DRAFT, SPECULATE_METAVAR, check_speculate, draft_model

STORE_PANEL = "Jobs"
SAMPLING_PANEL = "Sampling"
SPECULATION_PANEL = "Speculation"

#: Default of `--give-up`, in seconds.
GIVE_UP = 3600.0

#: Seconds in each unit of an age.
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_age(text: str) -> int:
    """An age like `90s`, `30m`, `12h` or `7d`, in seconds. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text.strip(), re.ASCII)
    if not match:
        raise ConfigError(f"invalid age {text!r}: expected a number with s, m, h or d, e.g. 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


# --- language models ---------------------------------------------------------------------------------------

MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", min=1, metavar="N", help="Maximum number of tokens to generate.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        max=BOUNDS["temperature"].high,
        metavar="T",
        show_default="the checkpoint's, else 0",
        rich_help_panel=SAMPLING_PANEL,
        help="Sampling temperature; 0 always takes the most likely token.",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        metavar="P",
        show_default="the checkpoint's, else 1",
        rich_help_panel=SAMPLING_PANEL,
        help="Sample among the most likely tokens whose probabilities add up to P; 0 takes the most likely one.",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        min=-1,
        metavar="K",
        show_default="the checkpoint's, else 0",
        rich_help_panel=SAMPLING_PANEL,
        help="Sample among the K most likely tokens; 0 or -1 for all.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        show_default="drawn",
        help="Seed of the random numbers. The same seed gives the same output.",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End answers before this text. May be repeated."),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A system message before the conversation.")
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE|TEMPLATE",
        show_default="the tokenizer's",
        help="Chat template, in Jinja: a file, or the template itself.",
    ),
]
ChatTemplateKwargsOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="Values for variables that the chat template reads, as a JSON object: '{\"enable_thinking\": false}'.",
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="MODEL",
        show_default="the model's",
        rich_help_panel=MODEL_PANEL,
        help="Directory or hub id of the tokenizer, if it does not lie with the weights.",
    ),
]
RawOption = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")]

ShowOption = Annotated[
    list[Path] | None,
    typer.Option("--show", metavar="FILE", help="Show the model this image, before the prompt. May be repeated."),
]
AllowedLocalMediaPathOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--allowed-local-media-path",
        metavar="DIR",
        help="Let requests refer to images below this directory by file:// URLs. May be repeated. "
        "Without it, requests have to contain their images.",
    ),
]
CodecOption = Annotated[
    str,
    typer.Option(
        "--codec",
        parser=parse_codec,
        metavar="|".join(CODEC_NAMES),
        rich_help_panel=MODEL_PANEL,
        help="How hidden states are compressed. exact sends them as they are; lossless (texts only) changes no bit "
        "of them; fp16 (images only), int8 and int4 round them, so that answers may differ.",
    ),
]
#: `--codec` where only images are made.
ImageCodecOption = Annotated[
    str,
    typer.Option(
        "--codec",
        parser=parse_codec,
        metavar="|".join(name for name in CODECS if name != OLD_EXACT),
        rich_help_panel=MODEL_PANEL,
        help="How hidden states are compressed. exact sends them as they are; fp16, int8 and int4 round them, so "
        "that images may differ.",
    ),
]
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; `-` reads it from stdin.")]

# --- the queue and its workers -----------------------------------------------------------------------------

PatienceOption = Annotated[
    float,
    typer.Option(
        "--patience",
        min=0.0,
        metavar="SECONDS",
        rich_help_panel=QUEUE_PANEL,
        help="How long to wait for a worker while all are full, or after the last one was lost. `generate`, "
        "`chat`, `image` and `ping` also wait for a first one.",
    ),
]
StepTimeoutOption = Annotated[
    float,
    typer.Option(
        "--step-timeout",
        min=1.0,
        metavar="SECONDS",
        rich_help_panel=QUEUE_PANEL,
        help="How long to wait for a worker's answer before another worker is tried, if there is one.",
    ),
]
PadStepsOption = Annotated[
    bool,
    typer.Option(
        "--pad-steps/--no-pad-steps",
        rich_help_panel=PRIVACY_PANEL,
        help="Give decoding steps sizes that do not follow their tokens, so that the queue cannot tell how many "
        "were guessed, and how many were right. --no-pad-steps sends fewer bytes.",
    ),
]
HistoryOption = Annotated[
    int,
    typer.Option(
        "--history-memory",
        parser=parse_size,
        metavar="SIZE",
        show_default=f"{HISTORY_MEMORY // 2**20}MiB",
        rich_help_panel=QUEUE_PANEL,
        help="Memory for the states needed to resume on another worker. The rest spills to an encrypted temporary "
        "file.",
    ),
]

RequestIdOption = Annotated[
    str | None,
    typer.Option(
        "--request-id",
        parser=check_request_id,
        metavar="ID",
        show_default="drawn",
        rich_help_panel=QUEUE_PANEL,
        help="Id by which logs name the request: 1 to 128 visible ASCII characters. Brokers and workers do not "
        "learn it.",
    ),
]

# --- jobs --------------------------------------------------------------------------------------------------

StoreKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--store-key",
        metavar="FILE",
        envvar="LAMBDA_SPLIT_STORE_KEY",
        rich_help_panel=STORE_PANEL,
        help="Encrypt prompts and answers on disk under the key in this file. The file is made with the first job, "
        "and is needed from then on.",
    ),
]
GroupOption = Annotated[
    str | None,
    typer.Option(
        "--group",
        metavar="NAME",
        rich_help_panel=STORE_PANEL,
        help="Group of jobs. It begins with the first job that is submitted to it.",
    ),
]
OnDoneOption = Annotated[
    str | None,
    typer.Option(
        "--on-done",
        metavar="COMMAND",
        rich_help_panel=STORE_PANEL,
        help="Have the agent run a command when the job has ended, or with --group, when all of the group's jobs "
        "have. No shell reads it; LAMBDA_SPLIT_JOB, LAMBDA_SPLIT_GROUP and LAMBDA_SPLIT_JOB_STATE say what ended.",
    ),
]
WebhookOption = Annotated[
    str | None,
    typer.Option(
        "--webhook",
        metavar="URL",
        rich_help_panel=STORE_PANEL,
        help="Have the agent post the job's id, group and state as JSON when it has ended, or with --group, when "
        "all of the group's jobs have. The URL is https, or http on this machine.",
    ),
]
MaxJobsOption = Annotated[
    int,
    typer.Option(
        "--max-jobs",
        min=1,
        max=4096,
        metavar="N",
        rich_help_panel=STORE_PANEL,
        help="Maximum number of jobs, or of a server's prompts, that are computed at once.",
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
        help="Maximum number of images that are made at once.",
    ),
]
KvMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--kv-memory",
        parser=parse_size,
        metavar="SIZE",
        rich_help_panel=MODEL_PANEL,
        show_default="1GiB",
        help="Memory for the keys and values of each model's head and tail.",
    ),
]
PrefixCacheOption = Annotated[
    int,
    typer.Option(
        "--prefix-cache",
        parser=parse_cache_size,
        metavar="SIZE",
        rich_help_panel=STORE_PANEL,
        show_default=f"{PREFIX_CACHE // 2**30}GiB",
        help="Memory for what requests leave behind when they end: later ones that begin with the same tokens send "
        "only what is new. 0 or off turns it off.",
    ),
]


def parse_speculate(name: str) -> str:
    """What `--speculate` asks for, the directory of a draft model in full. Raises ConfigError if it is not one."""
    if (model := draft_model(check_speculate(name))) is None or not user_path(model).exists():
        return name
    return f"{DRAFT}{user_path(model).resolve()}"


SpeculateOption = Annotated[
    str,
    typer.Option(
        "--speculate",
        parser=parse_speculate,
        metavar=SPECULATE_METAVAR,
        rich_help_panel=SPECULATION_PANEL,
        help="How to guess the next tokens: the worker checks several guesses in one trip, and the answer stays "
        "the same. auto guesses only as many as pay. With draft:MODEL, a small model with the same tokenizer "
        "guesses on the device; with mtp, MTP layers of the checkpoint do.",
    ),
]
JobSpeculateOption = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        parser=parse_speculate,
        metavar=SPECULATE_METAVAR,
        rich_help_panel=SPECULATION_PANEL,
        show_default="the agent's",
        help="How to guess the next tokens of this job. draft:MODEL and mtp need the agent's own.",
    ),
]
GiveUpOption = Annotated[
    float,
    typer.Option(
        "--give-up",
        min=0.0,
        metavar="SECONDS",
        rich_help_panel=STORE_PANEL,
        help="How long to retry jobs while there is no broker or no worker; then they fail.",
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        metavar="AGE",
        rich_help_panel=STORE_PANEL,
        show_default="until `jobs prune`",
        help="Remove jobs and batches that ended longer ago than this, e.g. 12h or 7d.",
    ),
]
