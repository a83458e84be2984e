"""What the queue can tell of prompts from the sizes, the number and the times of messages.

Prompts of one length are answered several times each, with other seeds, many at once, in a random order.
Recorded is what a broker sees of each answer's session: the direction, the size and the time of every message. A
nearest-neighbour classifier then says of each answer which prompt it is to, by the answer that is most like it; of
several that are equally like it, each counts its share. Once with steps of one size (`padded`), and once with sizes
that follow the tokens (`unpadded`).

The attack is that of arXiv 2411.01076 (sizes and counts) and 2410.17175 (times), with the simplest classifier.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import arguments, checkpoint, exact_request, fleet, note, report
from benchmarks.prompts import KINDS, PROMPTS, prompts
from split_common.protocol import headers
from split_common.system.process import passive_threads

#: Whether steps have one size, by the name of the setting.
SETTINGS = {"padded": True, "unpadded": False}

#: Shorter than what a chat template may have by default.
SYSTEM = "Answer well."

#: What follows short questions, so that all prompts have one length.
MORE = (
    " Answer in several paragraphs, give reasons and examples for each of your points, mention what is often "
    "misunderstood, and end with a short summary of what one should remember. Do not use any lists or headings."
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts, runs and tokens")
    parser.add_argument("--prompts", type=int, help="number of prompts; default: 50, or 4 with --quick")
    parser.add_argument("--runs", type=int, help="answers to each prompt; default: 10, or 3 with --quick")
    parser.add_argument("--length", type=int, default=72, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, help="tokens of each answer; default: 32, or 8 with --quick")
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampling")
    parser.add_argument("--speculate", default="ngram", help="the drafter")
    parser.add_argument("--sessions", type=int, default=8, help="answers at once")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="padded, unpadded, or both")
    parser.add_argument("--seed", type=int, default=0, help="of the order, and of sampling")
    options = parser.parse_args()
    options.prompts = options.prompts or (4 if options.quick else 50)
    options.runs = options.runs or (3 if options.quick else 10)
    options.tokens = options.tokens or (8 if options.quick else 32)
    passive_threads()
    report(measure(options), options.json, "what messages tell of prompts")


@dataclass
class Trace:
    """The messages of an answer's session, as a broker sees them."""

    #: Bytes, below zero if the message goes to the device; and seconds, by `time.perf_counter`.
    sizes: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, size: int) -> None:
        self.sizes.append(size)
        self.times.append(time.perf_counter())

    def until_the_last_answer(self) -> Trace:
        """Without what ends the session, which would tell of a cut trace that it is a short one."""
        end = 1 + max(index for index, size in enumerate(self.sizes) if size < 0)
        return Trace(self.sizes[:end], self.times[:end])

    @property
    def gaps(self) -> list[float]:
        """Seconds between each message and the one before."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The share of answers whose prompt is found, by setting and by what is looked at."""
    model = checkpoint(options)
    found: dict[str, Any] = {}
    facts: dict[str, Any] = {"tokens_per_step": {}, "bytes_per_token": {}, "messages": {}}
    for setting in options.settings.split(","):
        traces, labels, steps = _record(model, SETTINGS[setting], options)
        answered = len(traces) * options.tokens
        found[setting], facts["messages"][setting] = _accuracies(traces, labels)
        facts["tokens_per_step"][setting] = (answered - len(traces)) / (steps - len(traces))
        facts["bytes_per_token"][setting] = sum(abs(size) for trace in traces for size in trace.sizes) / answered
        note(f"{setting}: {found[setting]}")
    return {
        "prompts": options.prompts,
        "runs": options.runs,
        "chance": (options.runs - 1) / (options.prompts * options.runs - 1),
        "accuracy": found,
        **facts,
    }


def _record(model: Path, pads: bool, options: argparse.Namespace) -> tuple[list[Trace], list[int], int]:
    """Has a fleet answer all prompts. Returns a trace and a prompt's index for each answer, and all steps."""
    from split_device import SplitModelForCausalLM
    from split_device.generation.generator import Generator
    from split_device.generation.limits import Limits

    with (
        fleet(model) as (broker, _),
        SplitModelForCausalLM.from_pretrained(
            model, broker=broker, head_layers=2, tail_layers=2, pad_steps=pads
        ) as split,
    ):
        traces = _tap(split)
        asked = _prompts(model, options)
        order = [(index, run) for index in range(len(asked)) for run in range(options.runs)]
        random.Random(options.seed).shuffle(order)
        limits = Limits(requests=options.sessions, prefix_cache=0, speculate=options.speculate)
        with Generator(split, limits=limits) as generator:
            generations = [
                # How long answers are is another matter.
                generator.submit(
                    exact_request(
                        asked[index],
                        options.tokens,
                        {"do_sample": True, "temperature": options.temperature},
                        seed=options.seed + index * options.runs + run,
                    )
                )
                for index, run in order
            ]
            for generation in generations:
                generation.result()
            steps = generator.counters["steps"]
    found = [traces[str(each.session)].until_the_last_answer() for each in generations]
    return found, [index for index, _ in order], steps


def _tap(split: Any) -> dict[str, Trace]:
    """Traces of all sessions of a device from now on, by the session's name in logs."""
    client = split.split_parts.client
    traces: dict[str, Trace] = defaultdict(Trace)
    send, receive = client.transport.send, client.on_message

    def size(header: headers.Relay, body: bytes) -> int:
        return len(headers.encode_header(header)) + len(body)

    def sending(header: Any, body: bytes = b"") -> None:
        if isinstance(header, headers.Relay) and header.session:
            traces[headers.session_label(header.session)].add(size(header, body))
        send(header, body)

    def receiving(header: Any, body: bytes) -> None:
        if isinstance(header, headers.Relay) and header.session:
            traces[headers.session_label(header.session)].add(-size(header, body))
        receive(header, body)

    client.transport.send, client.on_message = sending, receiving
    return traces


def _prompts(model: Path, options: argparse.Namespace) -> list[list[int]]:
    """Conversations of `--length` tokens each: the beginnings of prompts of all kinds by turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    before, after = _around(tokenizer)
    room = options.length - len(before) - len(after)
    of_kinds = prompts(PROMPTS)
    asked = []
    for texts in zip(*(of_kinds[kind] for kind in KINDS), strict=True):
        for text in texts:
            tokens = tokenizer.encode(text + MORE, add_special_tokens=False)[:room]
            asked.append([*before, *tokens, *after])
    asked = asked[: options.prompts]
    assert len(asked) == options.prompts, f"there are {len(asked)} prompts"
    assert {len(tokens) for tokens in asked} == {options.length}, "prompts of different lengths"
    return asked


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of a conversation before and after what the user says; none without a chat template."""
    from split_device.generation.tokenizing import encode_chat

    if tokenizer.chat_template is None:
        return [], []
    system = {"role": "system", "content": SYSTEM}
    one, other = (
        encode_chat(tokenizer, [system, {"role": "user", "content": text}])[0].tolist() for text in ("yes", "no")
    )
    start = [first == second for first, second in zip(one, other, strict=False)].index(False)
    end = [first == second for first, second in zip(reversed(one), reversed(other), strict=False)].index(False)
    return one[:start], one[len(one) - end :]


# --- the classifier ------------------------------------------------------------------------------------------


def _accuracies(traces: Sequence[Trace], labels: Sequence[int]) -> tuple[dict[str, float], int]:
    """The share of answers that are right, by what is looked at; and the number of messages that traces are cut to.

    `sizes` and `times` of as many messages as all traces have, the number of messages in `counts`, and `all` of all
    messages.
    """
    least = min(len(trace.sizes) for trace in traces)
    most = max(len(trace.sizes) for trace in traces)
    sizes = torch.tensor([trace.sizes[:least] for trace in traces], dtype=torch.float64)
    times = torch.tensor([trace.gaps[: least - 1] for trace in traces], dtype=torch.float64)
    counts = torch.tensor([[len(trace.sizes)] for trace in traces], dtype=torch.float64)
    whole = torch.tensor([trace.sizes + [0] * (most - len(trace.sizes)) for trace in traces], dtype=torch.float64)
    waits = torch.tensor([trace.gaps + [0.0] * (most - len(trace.sizes)) for trace in traces], dtype=torch.float64)
    looked_at = {
        "sizes": [sizes],
        "counts": [counts],
        "times": [times],
        "all": [whole, waits, counts],
    }
    right = torch.tensor(labels)
    return {
        name: nearest_neighbour([_scaled(each) for each in some], right) for name, some in looked_at.items()
    }, least


def _scaled(features: torch.Tensor) -> torch.Tensor:
    """Features `[traces, features]`, each with a spread of 1, or 0 if it is the same in all; over their number."""
    spread = features.std(0)
    scaled = (features - features.mean(0)) / torch.where(spread > 0, spread, 1.0)
    return scaled / features.shape[1]


def nearest_neighbour(parts: Sequence[torch.Tensor], labels: torch.Tensor) -> float:
    """How often the nearest other trace has the label of a trace.

    Args:
        parts: features `[traces, features]`; distances are sums of absolute differences.
        labels: int64 `[traces]`.
    """
    distances = torch.cdist(torch.cat([*parts], 1), torch.cat([*parts], 1), p=1)
    distances.fill_diagonal_(float("inf"))
    nearest = distances <= distances.min(1, keepdim=True).values + 1e-12
    same = labels[:, None] == labels[None]
    return float(((nearest & same).sum(1) / nearest.sum(1)).mean())


if __name__ == "__main__":
    main()
