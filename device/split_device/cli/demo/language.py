"""`lambda-split demo` of a language model: one question, a batch, or a server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from json import dumps, loads
from pathlib import Path

from split_common.errors import SplitError
from split_common.system.console import emit_json, print_text, stderr
from split_common.system.process import running_command
from split_common.system.signals import POLL_INTERVAL
from split_device.cli.demo.fleet import DemoFleet
from split_device.generation.limits import ONE_ANSWER
from split_device.generation.settings import Sampling
from split_device.jobs.job import ModelChoice
from split_device.models.hardware import Hardware
from split_device.sessions.connection import Connection
from split_device.speculation.names import OFF

QUESTION = "What is the capital of France, and what is it known for?"

#: The prompts of the batch.
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


def ask(fleet: DemoFleet, prompt: str, checkpoint: str, max_tokens: int, json: bool) -> None:
    """Asks one question from this process; prints the answer, the model's parts, and what the broker saw."""
    from split_common.models.loading import read_spec
    from split_device.cli.tables import parts_table
    from split_device.generation.tokenizing import load_tokenizer
    from split_device.jobs.chat import Conversation
    from split_device.jobs.models import loaded_model
    from split_device.models.sizes import parts

    choice, tokenizer, spec = ModelChoice(name=checkpoint), load_tokenizer(checkpoint), read_spec(checkpoint)
    place = Connection(broker=fleet.address), ONE_ANSWER.but(speculate=OFF), Hardware()
    with loaded_model(choice, *place, tokenizer, None) as loaded:
        split = loaded.model
        table = parts(spec, split.split)
        stderr.print(parts_table(fleet.model, table))
        stderr.print(prompt, style="bold", soft_wrap=True)
        before = split.traffic
        answer = Conversation(loaded, choice).say(prompt, Sampling(max_tokens), _print_on(json))
        after = split.traffic
        steps = max(1, answer.prompt_tokens + answer.tokens - 1)
        up = (after["bytes_sent"] - before["bytes_sent"]) / steps
        down = (after["bytes_received"] - before["bytes_received"]) / steps
        seen = fleet.last_routed()
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
    _say("the worker decrypts what it computes on: whoever runs it can find out the text")


def answer_batch(options: list[str], directory: Path, max_tokens: int, json: bool) -> None:
    """Answers a file of prompts with `lambda-split batch`."""
    requests, answers = directory / "in.jsonl", directory / "out.jsonl"
    lines = [_request(f"prompt-{number}", question, max_tokens) for number, question in enumerate(QUESTIONS, 1)]
    requests.write_text("".join(f"{line}\n" for line in lines))
    arguments = ["batch", str(requests), "--output", str(answers), *options]
    with running_command(arguments, env={"LAMBDA_SPLIT_STATE": str(directory / "state")}) as (_, facts):
        records = [loads(line) for line in answers.read_text(encoding="utf-8").split("\n") if line]
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
        print_text(text)
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


def serve_demo(options: list[str], json: bool) -> None:
    """Runs `lambda-split serve` until Ctrl-C."""
    with running_command(["serve", "--port", "0", *options]) as (server, facts):
        if json:
            emit_json(facts)
        _say("Ctrl-C ends it")
        while server.poll() is None:
            # As in `wait_until_set`: a signal is seen when a wait ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(POLL_INTERVAL)
        raise SplitError("lambda-split serve has ended by itself")


def _say(line: str) -> None:
    stderr.print(line, soft_wrap=True)


def _print_on(json: bool) -> Callable[[str], None]:
    def print_now(text: str) -> None:
        print_text(text, end="", stream=sys.stderr if json else sys.stdout)

    return print_now
