"""The device's commands: generate, chat, inspect, doctor, demo."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from split_common.console import emit_json, stderr
from split_common.errors import ConfigError, SessionLost
from split_common.options import (
    DEFAULT_BROKER,
    BrokerOption,
    DtypeOption,
    JsonOption,
    KeysOption,
    MemberOption,
    ModelOption,
    RevisionOption,
    TimeoutOption,
    resolve_model,
)
from split_common.process import passive_threads

HeadOption = Annotated[int, typer.Option("--head-layers", min=0, help="Decoder layers before the body.")]
TailOption = Annotated[int, typer.Option("--tail-layers", min=0, help="Decoder layers after the body.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")]
TopPOption = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")]
TopKOption = Annotated[int, typer.Option(min=0, help="Sample from so many likeliest tokens; 0 for all.")]
SeedOption = Annotated[int | None, typer.Option(help="Of sampling.")]
SystemOption = Annotated[str | None, typer.Option(help="A system message before the conversation.")]
TimingsOption = Annotated[bool, typer.Option("--timings", help="Print where a token's time went.")]
PatienceOption = Annotated[float, typer.Option(min=0.0, help="Seconds to wait while all workers are full.")]


def register(app: typer.Typer) -> None:
    """Adds the device's commands to `app`."""
    from split_device.demo import demo
    from split_device.doctor import doctor

    for command in (generate, chat, inspect, demo, doctor):
        app.command()(command)


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from stdin.")],
    model: ModelOption = None,
    broker: BrokerOption = DEFAULT_BROKER,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    system: SystemOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")
    ] = False,
    head_layers: HeadOption = 2,
    tail_layers: TailOption = 2,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    patience: PatienceOption = 60.0,
    timings: TimingsOption = False,
    json: JsonOption = False,
) -> None:
    """Answer a prompt through a split model; the text streams to stdout as it comes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("the prompt is empty")
    passive_threads()
    checkpoint = resolve_model(model)

    from split_device.chatting import Conversation, Sampling, encode_chat, encode_text, load_tokenizer
    from split_device.model import SplitModelForCausalLM

    tokenizer = load_tokenizer(checkpoint, revision)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    input_ids = encode_text(tokenizer, text) if raw else encode_chat(tokenizer, messages)
    with SplitModelForCausalLM.from_pretrained(
        checkpoint,
        broker=broker,
        head_layers=head_layers,
        tail_layers=tail_layers,
        dtype=dtype,
        revision=revision,
        keys=keys,
        member=member,
        timeout=timeout,
        patience=patience,
    ) as split:
        sampling = Sampling(max_tokens, temperature, top_p, top_k, seed)
        answer = Conversation(split, tokenizer).complete(input_ids, sampling, _ignore if json else _print_now)
        if not json:
            print(flush=True)
        if timings:
            print_timings(split.timings.per_step_ms())
        if json:
            emit_json(
                dataclasses.asdict(answer)
                | {"tokens_per_second": answer.tokens_per_second}
                | {"timings_ms": split.timings.per_step_ms(), "traffic": split.traffic}
            )


def chat(
    model: ModelOption = None,
    broker: BrokerOption = DEFAULT_BROKER,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    system: SystemOption = None,
    head_layers: HeadOption = 2,
    tail_layers: TailOption = 2,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    patience: PatienceOption = 60.0,
) -> None:
    """Talk with a split model; each turn sends only what is new. /reset forgets, /quit (or Ctrl-D) ends."""
    passive_threads()
    checkpoint = resolve_model(model)

    from split_device.chatting import Conversation, Sampling, load_tokenizer
    from split_device.model import SplitModelForCausalLM

    tokenizer = load_tokenizer(checkpoint, revision)
    with SplitModelForCausalLM.from_pretrained(
        checkpoint,
        broker=broker,
        head_layers=head_layers,
        tail_layers=tail_layers,
        dtype=dtype,
        revision=revision,
        keys=keys,
        member=member,
        timeout=timeout,
        patience=patience,
    ) as split:
        conversation = Conversation(split, tokenizer)
        start = [{"role": "system", "content": system}] if system else []
        conversation.messages = list(start)
        sampling = Sampling(max_tokens, temperature, top_p, top_k, seed)
        while (line := _read_line()) is not None and line != "/quit":
            if line == "/reset":
                conversation.reset()
                conversation.messages = list(start)
            elif line:
                _turn(conversation, line, sampling)


def _turn(conversation: Any, line: str, sampling: Any) -> None:
    """One turn; if its worker is gone, the conversation is sent again to another one, once."""
    try:
        conversation.say(line, sampling, _print_now)
    except SessionLost as lost:
        stderr.print(f"\n{lost}; sending the conversation again")
        conversation.say(line, sampling, _print_now)
    print(flush=True)


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def inspect(
    model: Annotated[str | None, typer.Argument(help="Directory or hub id; default: the demo model.")] = None,
    head_layers: HeadOption = 2,
    tail_layers: TailOption = 2,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    json: JsonOption = False,
) -> None:
    """Show what of a model the device keeps and what the worker runs; no weight is read."""
    checkpoint = resolve_model(model)

    from split_common.part import plan
    from split_common.split import Split
    from split_common.tensors import parse_dtype
    from split_device.parts import parts

    plan_ = plan(checkpoint, revision)
    split = Split.from_head_tail(plan_.layers, head_layers, tail_layers)
    rows = parts(plan_, split, parse_dtype(dtype))
    if json:
        emit_json({"model": plan_.checkpoint.name, "layers": plan_.layers, "parts": [_fields(row) for row in rows]})
    else:
        from rich.console import Console

        Console(highlight=False).print(parts_table(plan_.checkpoint.name, rows))


def parts_table(name: str, rows: list[Any]) -> Table:
    """A table of a model's parts."""
    table = Table("part", "where", "layers", title=name)
    for column in ("parameters", "MiB", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        where = "worker" if row.name == "body" else "device"
        size = f"{row.bytes / 2**20:,.1f}"
        table.add_row(row.name, where, row.layers, f"{row.parameters:,}", size, f"{row.share:.1%}")
    return table


def print_timings(stages: dict[str, float]) -> None:
    """Prints mean milliseconds of each stage of a step."""
    table = Table("stage", title="a token's time")
    table.add_column("ms", justify="right")
    for stage, milliseconds in stages.items():
        table.add_row(stage, f"{milliseconds:.2f}")
    table.add_row("all", f"{sum(stages.values()):.2f}")
    stderr.print(table)


def _fields(row: Any) -> dict[str, Any]:
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(row)
    return fields


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(_text: str) -> None:
    pass
