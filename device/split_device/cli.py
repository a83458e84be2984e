"""The device's commands that answer at once: generate, chat, inspect. And where all of its commands are added."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from split_common.cli.options import (
    DEFAULT_BROKER,
    BrokerOption,
    DtypeOption,
    JsonOption,
    KeysOption,
    MemberOption,
    ModelOption,
    RevisionOption,
    TimeoutOption,
    parse_size,
    resolve_model,
)
from split_common.console import emit_json, stderr, stdout
from split_common.errors import ConfigError, SessionLost, SplitError, StepFailed
from split_common.fleet import load_fleet
from split_common.keys import verify_certificate
from split_common.process import passive_threads
from split_common.transport import connect
from split_device.options import (
    HeadOption,
    HistoryOption,
    MaxTokensOption,
    PatienceOption,
    SeedOption,
    StepTimeoutOption,
    SystemOption,
    TailOption,
    TemperatureOption,
    TimingsOption,
    TopKOption,
    TopPOption,
)
from split_device.settings import Sampling


def register(app: typer.Typer) -> None:
    """Adds the device's commands to `app`."""
    from split_device.demo import demo
    from split_device.diffusion.cli import image
    from split_device.doctor import doctor
    from split_device.jobs import agent_cli
    from split_device.jobs import cli as jobs_cli
    from split_device.jobs.batch_cli import batch
    from split_device.openai.serve_cli import serve
    from split_device.stress.cli import stress
    from split_device.stress.device import stress_device

    commands = (generate, chat, image, jobs_cli.submit, batch, serve, inspect, demo, doctor, stress, dead_letters)
    for command in commands:
        app.command()(command)
    app.command(hidden=True)(stress_device)
    app.add_typer(agent_cli.app, name="agent")
    app.add_typer(jobs_cli.app, name="jobs")


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; `-` reads it from stdin.")],
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
    step_timeout: StepTimeoutOption = 60.0,
    history_memory: HistoryOption = "64MiB",
    timings: TimingsOption = False,
    json: JsonOption = False,
) -> None:
    """Answer a prompt through a split model; the text streams to stdout as it comes.

    Needs a running `lambda-split broker`, or Redis, and a `lambda-split worker` that serves the same model and
    layers.
    """
    text = _text(prompt)
    if raw and system:
        raise ConfigError("--raw and --system do not go together: a raw prompt has no messages")
    passive_threads()
    history_bytes = parse_size(history_memory)
    _check_queue(broker, keys, member)
    checkpoint = resolve_model(model)

    from split_device.chatting import Conversation, encode_chat, encode_text, load_tokenizer
    from split_device.model import SplitModelForCausalLM

    tokenizer = load_tokenizer(checkpoint, revision)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    input_ids = encode_text(tokenizer, text) if raw else encode_chat(tokenizer, messages)
    prompt_ms: dict[str, float] = {}
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
        step_timeout=step_timeout,
        history_memory=history_bytes,
    ) as split:

        def note_prompt() -> None:
            prompt_ms.update(split.timings.per_step_ms())
            split.timings.reset()

        sampling = Sampling(max_tokens, temperature, top_p, top_k, seed)
        with _answer_line(json) as on_text:
            try:
                answer = Conversation(split, tokenizer).complete(input_ids, sampling, on_text, note_prompt)
            except StepFailed:
                raise
            except SessionLost as lost:
                raise SessionLost(f"{lost}, and no other took over within {patience:g} s: start one") from None
        token_ms = split.timings.per_step_ms()
        if timings:
            stderr.print(timings_table(prompt_ms, token_ms))
            stderr.print(f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s after the first")
        if json:
            emit_json(
                dataclasses.asdict(answer)
                | {"tokens_per_second": answer.tokens_per_second}
                | {"prompt_timings_ms": prompt_ms, "timings_ms": token_ms, "traffic": split.traffic}
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
    step_timeout: StepTimeoutOption = 60.0,
    history_memory: HistoryOption = "64MiB",
    json: JsonOption = False,
) -> None:
    """Talk with a split model; each turn sends only what is new.

    One line is one turn. /reset forgets the conversation; /quit or Ctrl-D ends it. In a terminal Ctrl-C stops an
    answer. With --json the turns are printed at the end, as one object.
    """
    passive_threads()
    history_bytes = parse_size(history_memory)
    _check_queue(broker, keys, member)
    checkpoint = resolve_model(model)

    from split_device.chatting import Conversation, load_tokenizer
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
        step_timeout=step_timeout,
        history_memory=history_bytes,
    ) as split:
        start = [{"role": "system", "content": system}] if system else []
        conversation = Conversation(split, tokenizer, start)
        sampling = Sampling(max_tokens, temperature, top_p, top_k, seed)
        turns = []
        interactive = sys.stdin.isatty()
        if interactive:
            stderr.print("/reset forgets the conversation; /quit or Ctrl-D ends it")
        while (line := _read_line(interactive)) is not None and line != "/quit":
            if line == "/reset":
                conversation.reset()
            elif line:
                with _survived() if interactive else contextlib.nullcontext(), _answer_line(json) as on_text:
                    answer = conversation.say(line, sampling, on_text)
                    turns.append({"prompt": line} | dataclasses.asdict(answer))
        if json:
            emit_json({"turns": turns, "traffic": split.traffic})


def dead_letters(
    clear: Annotated[bool, typer.Option("--clear", help="Remove them after they were shown.")] = False,
    json: JsonOption = False,
) -> None:
    """Show the steps of this user's generations that were given up, because workers failed or died at them.

    What they held is not recorded: neither text nor states.
    """
    from split_device.sessions import dead_letters as letters
    from split_device.sessions.session import printable

    found = letters.read()
    if json:
        emit_json({"dead_letters": [_fields(letter) for letter in found]})
    for letter in found if not json else ():
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.time))
        print(
            f"{when} {letter.model} layers {letter.layers}: {letter.tokens} tokens of {letter.rows} rows after "
            f"{letter.cached}, at {', '.join(letter.workers)}: {printable(letter.reason)}"
        )
    if not found and not json:
        stderr.print("no step was given up")
    if clear:
        letters.clear()


@contextlib.contextmanager
def _answer_line(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Prints an answer as it comes, and ends its line, however the answer ends."""
    begun = False

    def print_now(text: str) -> None:
        nonlocal begun
        if not quiet:
            begun = True
            print(text, end="", flush=True)

    try:
        yield print_now
    finally:
        if begun:
            print(flush=True)


@contextlib.contextmanager
def _survived() -> Iterator[None]:
    """In a terminal, what ends a turn does not end the conversation: an error, or Ctrl-C."""
    try:
        yield
    except SplitError as error:
        stderr.print(f"error: {error}", soft_wrap=True)
    except KeyboardInterrupt:
        stderr.print("stopped; the turn is forgotten")


def _read_line(interactive: bool) -> str | None:
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise ConfigError("stdin is not UTF-8") from None


def inspect(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory or hub id; default: the demo model.")
    ] = None,
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
    from split_device.parts import bytes_per_token, parts

    plan_ = plan(checkpoint, revision)
    split = Split.from_head_tail(plan_.layers, head_layers, tail_layers)
    rows = parts(plan_, split, parse_dtype(dtype))
    states = bytes_per_token(plan_, parse_dtype(dtype))
    if json:
        emit_json(
            {
                "model": plan_.checkpoint.name,
                "layers": plan_.layers,
                "bytes_per_token": states,
                "parts": [_fields(row) for row in rows],
            }
        )
    else:
        stdout().print(parts_table(plan_.checkpoint.name, rows))
        print(f"{states:,} bytes of hidden states travel in each direction for each token")


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


def timings_table(prompt_ms: dict[str, float], token_ms: dict[str, float]) -> Table:
    """Milliseconds of each stage: of the prompt, and the mean of the tokens after the first."""
    table = Table("stage", title="milliseconds")
    table.add_column("prompt", justify="right")
    table.add_column("each token", justify="right")
    for stage, milliseconds in token_ms.items():
        table.add_row(stage, f"{prompt_ms.get(stage, 0.0):.2f}", f"{milliseconds:.2f}")
    table.add_row("all", f"{sum(prompt_ms.values()):.2f}", f"{sum(token_ms.values()):.2f}")
    return table


def _text(prompt: str) -> str:
    """The prompt, or stdin for `-`. Raises ConfigError."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError:
        raise ConfigError("the prompt is not UTF-8") from None
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return text


def _check_queue(broker: str, keys: Path | None, member: str | None) -> None:
    """Raises ConfigError or CertificateError for a wrong address or wrong keys, before anything slow is done."""
    fleet = load_fleet(keys)
    identity = fleet.identity("device", member)
    connect(broker, fleet, identity).close()
    # The roster here may be old; the broker's counts.
    verify_certificate(identity.certificate_bytes, operator_key=fleet.operator_key, roster=None, role="device")


def _fields(row: Any) -> dict[str, Any]:
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(row)
    return fields
