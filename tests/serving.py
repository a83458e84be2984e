"""An HTTP server as a process, for those that ask it."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fleet import running_broker, start_worker
from split_common.system.process import running_command

KEY = "a-key"

#: A name of the host beside those that are always allowed.
HOST = "gateway.example"

#: Asked of a server that has a tool.
QUESTION = {"role": "user", "content": "Is it hot?"}

#: Bounded, so that random models come to an end.
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


@contextlib.contextmanager
def serving(
    checkpoint: Path, images: Path | None = None, name: str | None = None, options: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """A server's address, and the worker behind it, which is in this process; with images theirs."""
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(running_broker())
        options = [*options, "--model", str(checkpoint), "--broker", broker.address]
        worker = start_worker(checkpoint, broker.address)
        stack.callback(worker.stop)
        if images is not None:
            options += ["--image-model", str(images)]
            worker = start_worker(images, broker.address, cut="C")
            stack.callback(worker.stop)
        _, facts = stack.enter_context(
            running_command(
                ["serve", "--port", "0", "--allowed-host", HOST, *options], env={"LAMBDA_SPLIT_API_KEY": KEY}
            )
        )
        assert facts["model"] == (name or checkpoint.name)
        assert facts["image_model"] == (images.name if images is not None else None)
        yield facts["url"], worker


@contextlib.contextmanager
def hanging_up(url: str, body: Any, key: str) -> Iterator[None]:
    """A client that asks, and ends the connection on leaving, whether there was an answer or not."""
    split = urlsplit(url)
    assert split.hostname is not None
    connection = http.client.HTTPConnection(split.hostname, split.port)
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", split.path, json.dumps(body), headers)
        yield
    finally:
        connection.close()


class Unsplit:
    """What the unsplit model says."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint)

    def say(self, prompt: str, tokens: int, seed: int | None = None, eos: bool = True, **sampling: Any) -> str:
        """The greedy continuation; or, with a seed, a sampled one. Without `eos`, it goes on after end tokens."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        # The tokenizer's end token ends an answer, whether the model's defaults name it or not.
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": self.tokenizer.eos_token_id if eos else None}
        if seed is not None:
            torch.manual_seed(seed)
            options |= {"do_sample": True, "temperature": 1.0, "top_k": 0, **sampling}
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
