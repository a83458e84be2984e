"""`lambda-split demo`: a broker, a worker and a device on this machine, and what each of them sees."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from split_common.console import emit_json, stderr
from split_common.options import JsonOption, ModelOption, resolve_model
from split_common.process import passive_threads, running_command, use_loopback_keys
from split_device.settings import Sampling

QUESTION = "What is the capital of France, and what is it known for?"


def demo(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")] = QUESTION,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens to generate.")] = 64,
    json: JsonOption = False,
) -> None:
    """Ask a real model, split between this process and a worker process, over a broker process.

    All three run on this machine, with keys of its own, and end with the command.
    """
    passive_threads()
    checkpoint = resolve_model(model)
    with tempfile.TemporaryDirectory(prefix="lambda-split-demo-") as directory, contextlib.ExitStack() as stack:
        use_loopback_keys(Path(directory))
        log = Path(directory) / "broker.log"
        start = stack.enter_context
        stderr.print("starting a broker and a worker on this machine …")
        trace = {"LAMBDA_SPLIT_LOG": "debug"}
        _, queue = start(running_command(["broker", "--bind", "tcp://127.0.0.1:*"], log, trace))
        _, body = start(running_command(["worker", "--model", checkpoint, "--broker", queue["address"]]))

        from split_common.part import plan
        from split_common.split import Split
        from split_device.chatting import Conversation, encode_chat, load_tokenizer
        from split_device.cli import parts_table
        from split_device.model import SplitModelForCausalLM
        from split_device.parts import parts

        tokenizer = load_tokenizer(checkpoint)
        plan_ = plan(checkpoint)
        split = start(SplitModelForCausalLM.from_pretrained(checkpoint, broker=queue["address"]))
        table = parts(plan_, Split.from_head_tail(plan_.layers, 2, 2))
        stderr.print(parts_table(str(body["model"]), table))
        stderr.print(prompt, style="bold", soft_wrap=True)
        input_ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
        before = split.traffic
        answer = Conversation(split, tokenizer).complete(input_ids, Sampling(max_tokens), _print_on(json))
        after = split.traffic
        steps = max(1, answer.prompt_tokens + answer.tokens - 1)
        up = (after["bytes_sent"] - before["bytes_sent"]) / steps
        down = (after["bytes_received"] - before["bytes_received"]) / steps
        seen = _last_routed(log)
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


def _say(line: str) -> None:
    stderr.print(line, soft_wrap=True)


def _print_on(json: bool) -> Callable[[str], None]:
    def print_now(text: str) -> None:
        print(text, end="", flush=True, file=sys.stderr if json else sys.stdout)

    return print_now


def _last_routed(log: Path) -> list[str]:
    """The last step in the broker's log: a request and its reply."""
    lines = [line.partition(": routed ")[2] for line in log.read_text().splitlines() if ": routed " in line]
    last = max((index for index, line in enumerate(lines) if line.startswith("REPLY")), default=-1)
    return lines[max(0, last - 1) : last + 1]
