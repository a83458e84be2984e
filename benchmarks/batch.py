"""Many prompts at once on one device: tokens/s of the split model and of the unsplit one.

The unsplit model runs transformers' own `generate` in this process: one prompt after another, and in padded
batches. Drafts are off, but for `ratio_auto`: what `speculate="auto"` gives, over that.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import arguments, checkpoint, fleet, in_turns, ratios, report, summary
from split_common.system.process import passive_threads

PROMPTS = 64
SHORTEST, LONGEST = 8, 128
NEW_TOKENS = 48

#: Number of prompts in one padded batch of the unsplit model.
PADDED = 16

#: Tokens/s, the answers, and what else there is to report.
Run = tuple[Any, ...]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="number of prompts")
    parser.add_argument(
        "--sequential", type=int, default=12, help="number of prompts that the unsplit model runs one after another"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of times that each is measured, in turns")
    options = parser.parse_args()
    passive_threads()

    import torch
    from transformers import AutoModelForCausalLM

    from split_device import SplitModelForCausalLM

    model = checkpoint(options)
    unsplit = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = _prompts(options.prompts, unsplit.config.vocab_size)
    kept: dict[str, Any] = {}
    some = prompts[:: max(1, len(prompts) // options.sequential)]

    def measured(name: str, run: Callable[[], Run]) -> Callable[[], float]:
        """Runs it, keeps the answers of the last time, and returns tokens/s."""

        def once() -> float:
            rate: float
            rate, *kept[name] = run()
            return rate

        return once

    with (
        fleet(model, "2:-2", "--dtype", "float32") as (address, _),
        SplitModelForCausalLM.from_pretrained(model, broker=address, dtype="float32") as split,
    ):
        _batch(split, prompts[:2])  # warm
        _sequential(unsplit, prompts[:1])
        rates = in_turns(
            options.rounds,
            {
                "batch": measured("batch", lambda: _batch(split, prompts)),
                "auto": measured("auto", lambda: _batch(split, prompts, "auto")),
                "sequential": measured("sequential", lambda: _sequential(unsplit, some)),
                "padded": measured("padded", lambda: _padded(unsplit, prompts)),
            },
        )
    answers, counters = kept["batch"]
    [drafted, _], [one_by_one], [in_batches] = kept["auto"], kept["sequential"], kept["padded"]
    alone = answers[:: max(1, len(prompts) // options.sequential)]
    figures = {
        "batch_tok_s": rates["batch"],
        "unsplit_sequential_tok_s": rates["sequential"],
        "unsplit_batched_tok_s": rates["padded"],
        "ratio_sequential": ratios(rates["batch"], rates["sequential"]),
        "ratio_batched": ratios(rates["batch"], rates["padded"]),
        "ratio_auto": ratios(rates["auto"], rates["batch"]),
    }
    results = {
        **summary(figures),
        "identical": alone == one_by_one and drafted == answers,
        "same_as_batched": sum(one == other for one, other in zip(answers, in_batches, strict=True)) / len(prompts),
        "prompts": len(prompts),
        "tokens": sum(map(len, answers)),
        "rows_per_forward": counters["head_rows"] / counters["head_forwards"],
        "threads": torch.get_num_threads(),
    }
    report(results, options.json, f"batch, {len(prompts)} prompts, at most {NEW_TOKENS} new tokens")


def _prompts(count: int, vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    first = min(100, vocabulary // 2)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(count)]
    return [[draw.randrange(first, vocabulary) for _ in range(length)] for length in lengths]


def _options() -> dict[str, Any]:
    return {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": None}


def _batch(split: Any, prompts: list[list[int]], speculate: str = "off") -> tuple[float, list[list[int]], Any]:
    """Tokens/s, the answers, and the generator's counters."""
    from transformers import GenerationConfig

    from split_device.generation.generator import Generator, Request

    with Generator(split, max_requests=2 * len(prompts), prefix_cache=0, speculate=speculate) as generator:
        began = time.perf_counter()
        generations = [generator.submit(Request(prompt, GenerationConfig(**_options()))) for prompt in prompts]
        answers = [generation.result() for generation in generations]
        seconds = time.perf_counter() - began
    return sum(map(len, answers)) / seconds, answers, generator.counters


def _sequential(unsplit: Any, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    import torch

    began = time.perf_counter()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = unsplit.generate(ids, attention_mask=torch.ones_like(ids), **_options())
        answers.append(output[0, len(prompt) :].tolist())
    return sum(map(len, answers)) / (time.perf_counter() - began), answers


def _padded(unsplit: Any, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    import torch

    began = time.perf_counter()
    answers = []
    for start in range(0, len(prompts), PADDED):
        some = prompts[start : start + PADDED]
        longest = max(map(len, some))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in some])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in some])
        answers += unsplit.generate(ids, attention_mask=mask, **_options())[:, longest:].tolist()
    return sum(map(len, answers)) / (time.perf_counter() - began), answers


if __name__ == "__main__":
    main()
