"""`lambda-split ping`: how fast a split model is across this network, and which settings make it fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption
from split_common.errors import ConfigError
from split_common.system.console import doing, emit_json, stderr, stdout
from split_common.system.files import user_path
from split_common.system.process import passive_threads
from split_common.system.text import decode_text
from split_device.cli.checks import check_connection
from split_device.cli.groups import TEXT_MODEL, ConnectionOptions, HardwareOptions, TextModel
from split_device.cli.terminal import loading, waiting_for_workers
from split_device.jobs.job import Message, Task

if TYPE_CHECKING:
    from split_device.generation.cycles import Spread
    from split_device.generation.measured import Measured

#: The sample, where none is named: a question, a text to change, code to change, and a short question.
SAMPLE = (
    "Give five tips to learn a language.",
    "Rewrite the following text. Keep every sentence, but write 'boat' as 'ship'. Text: The boat left the harbour "
    "at dawn. Nobody on the boat had slept. By noon the boat was far out, and the wind had turned to the north.",
    "Here is a Python function:\n\ndef mean(values):\n    total = 0\n    for value in values:\n"
    "        total += value\n    return total / len(values)\n\nWrite the function again with type hints.",
    "Why is the sky blue?",
)

#: Most prompts of a sample, and most of its bytes.
MOST_PROMPTS, MOST_BYTES = 16, 1024 * 1024

#: `auto` is recommended unless another setting is faster by this factor: it follows the text and the network.
BETTER = 1.05

SampleOption = Annotated[
    Path | None,
    typer.Option(
        "--sample",
        metavar="FILE",
        show_default="a few prompts",
        help=f"Text file with a prompt on each line, at most {MOST_PROMPTS}. Use typical "
        "prompts; predictions depend on the text.",
    ),
]


@dataclass(frozen=True)
class Row:
    """What a setting will give, on the sample."""

    speculate: str
    codec: str
    sessions: int
    tokens_per_second: float
    tokens_per_step: float
    #: Whether the tokens are those of the unsplit model.
    exact: bool


@grouped
def ping(
    model: Annotated[TextModel, TEXT_MODEL.without("codec")],
    connection: ConnectionOptions,
    hardware: HardwareOptions,
    sample: SampleOption = None,
    json: JsonOption = False,
) -> None:
    """Measure the path to a worker, predict tokens/s for each setting, and recommend one.

    Takes a few minutes. Nothing else should use the device or its worker meanwhile.
    """
    prompts = _read(sample) if sample is not None else SAMPLE
    passive_threads()
    check_connection(connection)
    choice = model.choice()
    with contextlib.ExitStack() as stack:
        with loading(connection, choice.name):
            from split_device.generation.ping import Ping
            from split_device.generation.tokenizing import end_tokens, load_tokenizer
            from split_device.jobs.models import load_model, prompt_tokens

            tokenizer = load_tokenizer(*choice.tokenizer_place)
            tasks = [Task(model=choice, prompt=(Message("user", text),)) for text in prompts]
            tokens = [prompt_tokens(task, tokenizer) for task in tasks]
            split = stack.enter_context(load_model(choice, waiting_for_workers(connection), hardware))
        ping = Ping(split, tokens, end_tokens(split, tokenizer), lambda part: stderr.print(f"measuring {part} …"))
        measured = ping.measure()
    with doing("predicting"):
        rows = predicted(measured)
    best = recommended(rows)
    if json:
        emit_json(_report(measured, rows, best))
        return
    _print(measured, rows, best)


def _read(path: Path) -> tuple[str, ...]:
    """The prompts of a file. Raises ConfigError if it cannot be read, has none, or too many."""
    try:
        data = user_path(str(path)).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path} has more than {MOST_BYTES} bytes: a sample is a few prompts")
    found = tuple(filter(None, (line.strip() for line in decode_text(data, str(path)).split("\n"))))
    if not 0 < len(found) <= MOST_PROMPTS:
        raise ConfigError(f"{path} has {len(found)} prompts: a sample has 1 to {MOST_PROMPTS}, each on a line")
    return found


def predicted(measured: Measured) -> list[Row]:
    """All settings."""
    rows = []
    for sessions in measured.plain:
        for codec in measured.plain_codecs:
            for speculate in measured.choices(sessions):
                found = measured.forecast(speculate, codec, sessions)
                exact = codec in ("exact", "lossless")
                rows.append(Row(speculate, codec, sessions, found.tokens_per_second, found.tokens_per_step, exact))
    return rows


def recommended(rows: Iterable[Row]) -> dict[int, Row]:
    """By the number of sessions, the fastest setting that changes no token, or a default one that is nearly so."""
    best: dict[int, Row] = {}
    rows = [row for row in rows if row.exact]
    for sessions in dict.fromkeys(row.sessions for row in rows):
        own = [row for row in rows if row.sessions == sessions]
        fastest = max(own, key=lambda row: row.tokens_per_second)
        plain = [row for row in own if row.codec == "exact"]
        # The defaults first, then another drafter alone.
        choices = [
            *(row for row in plain if row.speculate == "auto"),
            *sorted(plain, key=lambda row: -row.tokens_per_second),
            fastest,
        ]
        near = fastest.tokens_per_second / BETTER
        best[sessions] = next(row for row in choices if row.tokens_per_second >= near)
    return best


def _report(measured: Measured, rows: list[Row], best: dict[int, Row]) -> dict[str, Any]:
    def ms(spread: Spread) -> dict[str, float]:
        return asdict(spread.scaled(1000))

    def mbit(rate: Spread | None) -> dict[str, float] | None:
        return None if rate is None else asdict(rate.scaled(1e-6))

    return {
        "round_trip_ms": ms(measured.round_trip),
        "up_mbit_s": mbit(measured.up),
        "down_mbit_s": mbit(measured.down),
        "worker_ms": {tokens: ms(spread) for tokens, spread in measured.worker.items()},
        "device_ms": {tokens: ms(spread) for tokens, spread in measured.device.items()},
        "cycle_ms": {
            name: {
                sessions: {tokens: ms(spread) for tokens, spread in row.items()} for sessions, row in cycles.items()
            }
            for name, cycles in _cycles(measured).items()
        },
        "codecs": {
            name: {codec: asdict(cost) for codec, cost in costs.items()}
            for name, costs in (("off", measured.plain_codecs), ("speculating", measured.codecs))
        },
        "sample": {"prompts": len(measured.texts), "tokens": sum(len(each.answer) for each in measured.texts)},
        "settings": [asdict(row) for row in rows],
        "recommended": {sessions: asdict(row) for sessions, row in best.items()},
        "notes": measured.notes,
    }


def _cycles(measured: Measured) -> dict[str, Mapping[int, Mapping[int, Spread]]]:
    """Cycles by sessions and the tokens of a step: without speculation, with chains, and with trees."""
    trees = measured.trees.cycles if measured.trees is not None else {}
    return {"off": measured.plain, "speculating": measured.cycles, "trees": trees}


def _print(measured: Measured, rows: list[Row], best: dict[int, Row]) -> None:
    console = stdout()
    console.print(_measured_table(measured))
    for sessions in measured.plain:
        console.print(_forecast_table([row for row in rows if row.sessions == sessions], sessions))
    tokens = sum(len(each.answer) for each in measured.texts)
    sample = f"{len(measured.texts)} prompts, {tokens} tokens of answers"
    stderr.print(f"predicted for a sample of {sample}; other texts give other numbers", soft_wrap=True)
    for note in measured.notes:
        stderr.print(f"not measured: {note}", soft_wrap=True)
    for sessions, row in best.items():
        console.print(
            f"recommended for {_count(sessions)}: --speculate {row.speculate} --codec {row.codec} "
            f"({row.tokens_per_second:.1f} tokens/s)",
            soft_wrap=True,
        )


def _count(sessions: int) -> str:
    return "one session" if sessions == 1 else f"{sessions} sessions at once"


def _measured_table(measured: Measured) -> Table:
    table = Table(title="measured, by sessions × tokens of a step")
    table.add_column(no_wrap=True)
    for column in ("mean", "median", "lowest", "highest", "samples"):
        table.add_column(column, justify="right")

    def add(name: str, spread: Spread, factor: float = 1000) -> None:
        *values, samples = astuple(spread.scaled(factor))
        table.add_row(name, *(f"{value:,.1f}" for value in values), str(samples))

    add("round trip, ms", measured.round_trip)
    for name, rate in (("to the worker, Mbit/s", measured.up), ("from the worker, Mbit/s", measured.down)):
        if rate is None:
            table.add_row(name, "too fast", "", "", "", "")
        else:
            add(name, rate, 1e-6)
    for name, by_tokens in (("worker", measured.worker), ("device", measured.device)):
        for tokens, spread in by_tokens.items():
            add(f"{name}, 1 × {tokens}, ms", spread)
    for name, cycles in _cycles(measured).items():
        for sessions, row in cycles.items():
            for tokens, spread in row.items():
                add(f"{name}, {sessions} × {tokens}, ms", spread)
    return table


def _forecast_table(rows: list[Row], sessions: int) -> Table:
    table = Table("speculate", title=f"tokens/s, {_count(sessions)}, by --speculate and --codec")
    table.add_column("tokens/step", justify="right")
    codecs = list(dict.fromkeys(row.codec for row in rows))
    for codec in codecs:
        table.add_column(codec, justify="right")
    for speculate in dict.fromkeys(row.speculate for row in rows):
        own = [row for row in rows if row.speculate == speculate]
        table.add_row(speculate, f"{own[0].tokens_per_step:.2f}", *(f"{row.tokens_per_second:.1f}" for row in own))
    return table
