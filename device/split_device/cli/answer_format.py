"""Options that say what an answer has to look like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from split_common.cli.groups import Group
from split_common.errors import ConfigError
from split_common.system.text import read_text
from split_device.generation.grammar import grammar_of
from split_device.generation.structured import StructuredOutputs

ANSWER_PANEL = "Answer"

JsonSchemaOption = Annotated[
    Path | None,
    typer.Option(
        "--json-schema",
        metavar="FILE",
        rich_help_panel=ANSWER_PANEL,
        help="The answer is JSON that fits the JSON Schema in this file.",
    ),
]
RegexOption = Annotated[
    str | None,
    typer.Option(
        "--regex",
        metavar="EXPRESSION",
        rich_help_panel=ANSWER_PANEL,
        help="The answer matches this regular expression as a whole.",
    ),
]
ChoiceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--choice",
        metavar="TEXT",
        rich_help_panel=ANSWER_PANEL,
        help="The answer is one of these texts: repeat the option for each.",
    ),
]
GrammarOption = Annotated[
    Path | None,
    typer.Option(
        "--grammar",
        metavar="FILE",
        rich_help_panel=ANSWER_PANEL,
        help="The answer is a text that the grammar in this file allows, in Lark's or GBNF's notation.",
    ),
]

#: Their names.
ANSWER_OPTIONS = ("--json-schema", "--regex", "--choice", "--grammar")


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer has to look like, as given by options; `structured` checks them."""

    json_schema: Path | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: Path | None = None

    def structured(self) -> StructuredOutputs | None:
        """The constraint; None for none.

        Raises:
            ConfigError: more than one is given, a file cannot be read, or the constraint is wrong.
            UnsupportedFeature: a keyword of the schema cannot be enforced.
        """
        if (self.json_schema, self.regex, self.grammar) == (None, None, None) and not self.choice:
            return None
        found = StructuredOutputs(
            json=None if self.json_schema is None else _schema(self.json_schema),
            regex=self.regex,
            choice=tuple(self.choice) if self.choice else None,
            grammar=None if self.grammar is None else read_text(self.grammar),
        )
        grammar_of(found)
        return found


def _schema(path: Path) -> dict[str, object] | bool:
    try:
        return msgspec.json.decode(read_text(path), type=dict[str, object] | bool)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{path} is not a JSON Schema: {error}") from None


AnswerFormatOptions = Annotated[
    AnswerFormat,
    Group(json_schema=JsonSchemaOption, regex=RegexOption, choice=ChoiceOption, grammar=GrammarOption),
]
