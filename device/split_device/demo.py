"""`lambda-split demo`: a broker, workers and a device on this machine, in one command."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from json import dumps, loads
from pathlib import Path
from typing import Annotated

import typer

from split_common.cli.options import JsonOption, ModelOption, given, resolve_model
from split_common.console import emit_json, stderr
from split_common.errors import ConfigError, SplitError
from split_common.process import LOOK_INTERVAL, passive_threads, running_command, use_loopback_keys
from split_device.diffusion.demo import image_demo
from split_device.settings import Sampling

QUESTION = "What is the capital of France, and what is it known for?"

#: Parameters that --image has no use for, and that only it has.
_NOT_FOR_IMAGES = ("model", "max_tokens", "workers")
_FOR_IMAGES = ("output",)

#: What the batch asks.
QUESTIONS = (
    "Which planet is the largest?",
    "Name three colours of the rainbow.",
    "Why is the sky blue?",
    "What do bees make?",
    "Write a sentence about the sea.",
    "What is seven times six?",
    "Translate 'good morning' into French.",
    "Who wrote Hamlet?",
    "How do plants use sunlight?",
    "What is the opposite of cold?",
    "Give me a name for a cat.",
    "Explain what a library is.",
)


def demo(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to ask. Default: something about Paris.")
    ] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Answer a small file of prompts instead.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Run the HTTP server and its chat page instead, until Ctrl-C.")
    ] = False,
    image: Annotated[
        bool,
        typer.Option("--image", help="Make pictures instead, by the small model in a clone of the repository."),
    ] = False,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="With --image: where the pictures go, a .png file."),
    ] = Path("digits.png"),
    model: ModelOption = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens of an answer; not for --serve.")
    ] = 64,
    workers: Annotated[int, typer.Option(min=1, max=16, metavar="N", help="Worker processes.")] = 1,
    json: JsonOption = False,
) -> None:
    """Ask a real model, split between this process and a worker process, over a broker process.

    All run on this machine, with keys of its own, and end with the command.
    """
    if batch + serve + image + (prompt is not None) > 1:
        raise ConfigError("of PROMPT, --batch, --serve and --image only one can be had")
    for option in given(context, _NOT_FOR_IMAGES if image else _FOR_IMAGES):
        raise ConfigError(f"{option} does not go with --image" if image else f"{option} needs --image")
    if image:
        image_demo(output, json)
        return
    passive_threads()
    checkpoint = resolve_model(model)
    with tempfile.TemporaryDirectory(prefix="lambda-split-demo-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        use_loopback_keys(directory)
        workers_ = "a worker" if workers == 1 else f"{workers} workers"
        stderr.print(f"starting a broker and {workers_} on this machine …")
        start = stack.enter_context
        log = directory / "broker.log"
        trace = {"LAMBDA_SPLIT_LOG": "debug"}
        _, queue = start(running_command(["broker", "--bind", "tcp://127.0.0.1:*"], log, trace))
        options = ["--model", checkpoint, "--broker", queue["address"]]
        bodies = [start(running_command(["worker", *options]))[1] for _ in range(workers)]
        if batch:
            _answer_batch(options, directory, max_tokens, json)
        elif serve:
            _serve(options, json)
        else:
            _ask(prompt or QUESTION, checkpoint, queue["address"], str(bodies[0]["model"]), log, max_tokens, json)


def _ask(prompt: str, checkpoint: str, address: str, name: str, log: Path, max_tokens: int, json: bool) -> None:
    """Asks one thing in this process, and shows what the parts are and what the broker saw."""
    from split_common.part import plan
    from split_common.split import Split
    from split_device.chatting import Conversation, encode_chat, load_tokenizer
    from split_device.cli import parts_table
    from split_device.model import SplitModelForCausalLM
    from split_device.parts import parts

    tokenizer = load_tokenizer(checkpoint)
    plan_ = plan(checkpoint)
    with SplitModelForCausalLM.from_pretrained(checkpoint, broker=address) as split:
        table = parts(plan_, Split.from_head_tail(plan_.layers, 2, 2))
        stderr.print(parts_table(name, table))
        stderr.print(prompt, style="bold", soft_wrap=True)
        input_ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
        before = split.traffic
        answer = Conversation(split, tokenizer).complete(input_ids, Sampling(max_tokens), _print_on(json))
        after = split.traffic
        steps = max(1, answer.prompt_tokens + answer.tokens - 1)
        up = (after["bytes_sent"] - before["bytes_sent"]) / steps
        down = (after["bytes_received"] - before["bytes_received"]) / steps
        seen = last_routed(log)
    facts = {
        "prompt": prompt,
        "text": answer.text,
        "tokens": answer.tokens,
        "tokens_per_second": answer.tokens_per_second,
        "bytes_per_token_up": up,
        "bytes_per_token_down": down,
        "broker_saw": seen,
    }
    if json:
        print(file=sys.stderr, flush=True)
        emit_json(facts)
        return
    print(flush=True)
    _say(f"\n{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s after the first")
    _say(f"{up:,.0f} bytes up and {down:,.0f} down for each token of prompt and answer, headers included")
    _say("what the broker saw of the last step, the body sealed between device and worker:")
    for line in seen:
        _say(f"  {line}")
    _say("the worker opens what it computes on: who runs the worker can find out the text")


def _answer_batch(options: list[str], directory: Path, max_tokens: int, json: bool) -> None:
    """Has `lambda-split batch` answer a file of prompts."""
    requests, answers = directory / "in.jsonl", directory / "out.jsonl"
    lines = [_request(f"prompt-{number}", question, max_tokens) for number, question in enumerate(QUESTIONS, 1)]
    requests.write_text("".join(f"{line}\n" for line in lines))
    arguments = ["batch", str(requests), "--output", str(answers), *options]
    with running_command(arguments, env={"LAMBDA_SPLIT_STATE": str(directory / "state")}) as (_, facts):
        records = [loads(line) for line in answers.read_text().splitlines()]
    if wrong := next((record["error"] for record in records if record["error"]), None):
        raise SplitError(f"a prompt was not answered: {wrong['message']}")
    texts = [record["response"]["body"]["choices"][0]["message"]["content"] for record in records]
    if json:
        del facts["output"]
        pairs = [{"prompt": question, "text": text} for question, text in zip(QUESTIONS, texts, strict=True)]
        emit_json(facts | {"answers": pairs})
        return
    for question, text in zip(QUESTIONS, texts, strict=True):
        stderr.print(question, style="bold", soft_wrap=True)
        print(text, flush=True)
    _say(f"{facts['tokens']} tokens for {facts['lines']} prompts, {facts['tokens_per_second']:.1f} tokens/s")


def _request(custom_id: str, question: str, max_tokens: int) -> str:
    """A line of a batch file."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    return dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def _serve(options: list[str], json: bool) -> None:
    """Runs `lambda-split serve` until Ctrl-C."""
    with running_command(["serve", "--port", "0", *options]) as (server, facts):
        if json:
            emit_json(facts)
        _say("Ctrl-C ends it")
        while server.poll() is None:
            # As in `wait_for`: a signal is seen when a wait ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(LOOK_INTERVAL)
        raise SplitError("lambda-split serve has ended by itself")


def _say(line: str) -> None:
    stderr.print(line, soft_wrap=True)


def _print_on(json: bool) -> Callable[[str], None]:
    def print_now(text: str) -> None:
        print(text, end="", flush=True, file=sys.stderr if json else sys.stdout)

    return print_now


def last_routed(log: Path) -> list[str]:
    """The last step in the broker's log: a request and its reply."""
    lines = [line.partition(": routed ")[2] for line in log.read_text().splitlines() if ": routed " in line]
    last = max((index for index, line in enumerate(lines) if line.startswith("REPLY")), default=-1)
    return lines[max(0, last - 1) : last + 1]
