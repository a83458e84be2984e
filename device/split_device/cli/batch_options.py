"""Options of `batch`: which of them hold for which lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.options import given
from split_common.errors import ConfigError
from split_device.batches.place import OutputForm
from split_device.batches.source import InputForm
from split_device.cli.answer_format import ANSWER_OPTIONS
from split_device.cli.batch_progress import ProgressMode
from split_device.cli.sampling_options import ADJUSTMENTS

INPUT_PANEL, OUTPUT_PANEL = "Input", "Output"

InputFormatOption = Annotated[
    InputForm | None,
    typer.Option(
        "--input-format",
        show_default="by the file's suffix and its first line",
        rich_help_panel=INPUT_PANEL,
        help="What a line of the file is: a request as in OpenAI's batches, an object with a `prompt`, a prompt, "
        "or a row of a table.",
    ),
]
ColumnOption = Annotated[
    str | None,
    typer.Option(
        "--column",
        metavar="NAME",
        show_default="prompt or text, or the only one",
        rich_help_panel=INPUT_PANEL,
        help="The column of a table with the prompts.",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        rich_help_panel=INPUT_PANEL,
        help="Make each prompt from this text, where names in braces stand for the line's fields: "
        "'Summarize: {text}'.",
    ),
]
FormatOption = Annotated[
    OutputForm | None,
    typer.Option(
        "--format",
        show_default="by the name of the file, else jsonl",
        rich_help_panel=OUTPUT_PANEL,
        help="How answers are written: as lines of JSON, as a table, or alone, one per line, with line breaks "
        "written as \\n.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=OUTPUT_PANEL, help="Overwrite existing answers and images."),
]
ProgressOption = Annotated[
    ProgressMode,
    typer.Option(
        "--progress",
        rich_help_panel=OUTPUT_PANEL,
        help="How progress is shown: auto is a bar on a terminal, and a line per minute elsewhere.",
    ),
]

#: Options whose values are defaults for OpenAI's requests too, by their fields.
_DEFAULTS = {
    "max_tokens": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    **ADJUSTMENTS,
    "seed": "--seed",
    "stop": "--stop",
}

#: Options for prompts, which a request of OpenAI's says for itself, or has no equal of.
_OF_PROMPTS = ("--column", "--template", "--image", "--system", "--raw", *ANSWER_OPTIONS)

#: Options for prompts of texts, and for those of images.
_OF_CONVERSATIONS = ("--system", "--chat-template", "--chat-template-kwargs")
_OF_TEXTS = (
    *("--max-tokens", "--temperature", "--top-p", "--top-k", "--stop", "--raw", "--tokenizer", "--adapter"),
    *ADJUSTMENTS.values(),
    *_OF_CONVERSATIONS,
    *ANSWER_OPTIONS,
)
_OF_IMAGES = ("--steps", "--size", "--guidance", "--negative", "--init-image", "--strength", "--metadata")

#: Options of image models, which OpenAI's requests may need.
_OF_IMAGE_MODELS = ("--cut", "--reuse", "--max-images")

#: Name of the file of answers in the directory of the pictures, if no other is given.
RESULTS = "results.jsonl"


def given_settings(context: typer.Context) -> frozenset[str]:
    """The fields of text settings that are on the command line."""
    found = given(context, _DEFAULTS.values())
    return frozenset(field for field, option in _DEFAULTS.items() if option in found)


def chosen_output(output: Path | None, output_dir: Path | None, image: bool) -> Path:
    """The file of answers. Makes the directory of the pictures. Raises ConfigError if there can be none."""
    if output_dir is None:
        if image:
            raise ConfigError("--image needs --output-dir, where the images are written")
        if output is None:
            raise ConfigError("give -o OUT, the file of answers")
        return output
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output_dir} cannot be made: {error.strerror}") from None
    return output or output_dir / RESULTS


def check_options(context: typer.Context, form: InputForm, image: bool, output_dir: Path | None) -> None:
    """Raises ConfigError for an option that has no effect on these lines."""
    if form == "openai":
        for option in given(context, (*_OF_PROMPTS, *_OF_IMAGES)):
            raise ConfigError(f"{option} is for prompts: the lines here are requests of OpenAI's batches")
        return
    for option in given(context, _OF_TEXTS if image else (*_OF_IMAGES, *_OF_IMAGE_MODELS)):
        raise ConfigError(f"{option} is for texts: leave --image out" if image else f"{option} needs --image")
    if output_dir is not None and not image:
        raise ConfigError("--output-dir needs --image")
    if given(context, ("--raw",)) and (others := given(context, _OF_CONVERSATIONS)):
        raise ConfigError(f"--raw and {others[0]} do not go together: a raw prompt has no messages")
