"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from split_common.errors import ConfigError
from split_common.models.split import DEFAULT_CUT, DEFAULT_LAYERS, Layers
from split_common.system.console import stderr

#: Headings in a command's help.
MODEL_PANEL = "Model"
QUEUE_PANEL = "Queue and keys"
PRIVACY_PANEL = "Privacy"

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
CutName = Literal["A", "C"]

KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        rich_help_panel=QUEUE_PANEL,
        show_default="$LAMBDA_SPLIT_KEYS, else `keys` in the settings directory, else keys for this machine alone",
        help="The fleet's directory.",
    ),
]
FleetOption = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        rich_help_panel=QUEUE_PANEL,
        show_default="$LAMBDA_SPLIT_KEYS, else `keys` in the settings directory",
        help="The fleet's directory.",
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
        show_default="SmolLM2-135M-Instruct, fetched once",
        help="Directory or hub id of a safetensors checkpoint, or a GGUF file.",
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        envvar="LAMBDA_SPLIT_MODEL",
        show_default="SmolLM2-135M-Instruct, fetched once",
        help="Directory or hub id of a safetensors checkpoint, or a GGUF file.",
    ),
]
LayersOption = Annotated[
    Layers | None,
    typer.Option(
        "--layers",
        parser=Layers.parse,
        metavar="FIRST:LAST",
        show_default=str(DEFAULT_LAYERS),
        rich_help_panel=MODEL_PANEL,
        help="The layers that workers run, as a slice: 2:-2 leaves the device two at each end. Devices and workers "
        "need the same.",
    ),
]
TuneOption = Annotated[
    Literal["on", "off"],
    typer.Option(
        "--tune",
        envvar="LAMBDA_SPLIT_TUNE",
        help="Language models on the CPU: measure which layout of weights is fastest, and compile code for it "
        "in the background where there is a C++ compiler. Once for each machine and model.",
    ),
]
CutOption = Annotated[
    CutName | None,
    typer.Option(
        "--cut",
        show_default=DEFAULT_CUT,
        rich_help_panel=MODEL_PANEL,
        help="Where an image model is cut. C leaves the device a UNet's first level, or a transformer's first and "
        "last block; A leaves it two levels, or a sixth of the blocks at each end. Devices and workers need the "
        "same.",
    ),
]
DeviceOption = Annotated[
    DeviceName,
    typer.Option(
        "--device",
        rich_help_panel=MODEL_PANEL,
        help="Where this process computes its part of the model. With auto, on a GPU if there is one, "
        "except for the head and tail of a language model.",
    ),
]
DevicesOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE[,DEVICE…]",
        rich_help_panel=MODEL_PANEL,
        help="Where the body runs: auto, cpu, cuda or cuda:N. With several GPUs, like cuda:0,cuda:1, each has a "
        "range of a language model's layers.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=1024,
        metavar="N",
        show_default="one per core",
        rich_help_panel=MODEL_PANEL,
        help="Number of CPU threads that compute.",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="REVISION", rich_help_panel=MODEL_PANEL, help="Branch, tag or commit of a hub model."
    ),
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
AdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        rich_help_panel=MODEL_PANEL,
        help="Directory of a LoRA in PEFT's format for a language model, and a name for it: by default that of the "
        "directory. May be repeated for `worker` and `serve`. Devices and workers need the same.",
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
    typer.Option(
        "--timeout",
        min=0.1,
        metavar="SECONDS",
        rich_help_panel=QUEUE_PANEL,
        help="How long to wait for the broker.",
    ),
]
DtypeOption = Annotated[
    DtypeName,
    typer.Option(
        "--dtype",
        rich_help_panel=MODEL_PANEL,
        help="Data type of weights and hidden states; auto takes the checkpoint's.",
    ),
]


def old_name(name: str, new: str, metavar: str) -> Any:
    """Marks an option that has another name now: it is hidden, and warns if it is given.

    Args:
        name: the old name, like `--head-layers`.
        new: what to write instead, for the warning.
        metavar: its value, from 0, as help named it.
    """
    return typer.Option(name, metavar=metavar, min=0, hidden=True, callback=_warning(name, new))


def _warning(name: str, new: str) -> Callable[[Any], Any]:
    def warn(value: Any) -> Any:
        if value is not None:
            stderr.print(f"warning: {name} is an old name: use {new}", soft_wrap=True, markup=False)
        return value

    return warn


def parse_size(size: str | int) -> int:
    """A size like `4GiB`, `512MiB` or `1000000`, in bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", str(size).strip(), re.IGNORECASE | re.ASCII)
    if not match:
        raise ConfigError(f"invalid size {size!r}: expected a number of bytes, or e.g. 4GiB or 512MiB")
    number = float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")
    if number >= 2**63:
        raise ConfigError(f"invalid size {size!r}: more bytes than 63 bits count")
    return int(number)


def parse_cache_size(size: str | int) -> int:
    """A size as in `parse_size`, or `off` for 0. Raises ConfigError."""
    return 0 if str(size).strip().lower() == "off" else parse_size(size)


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
