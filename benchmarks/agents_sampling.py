"""What penalties and top_p cost: tokens/s of many sessions that sample so, over those of greedy ones."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, fleet, note, prompt, report
from split_common.system.process import passive_threads

#: Number of sessions at once, of tokens in each prompt, and of tokens that each generates.
SESSIONS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 32

#: Runs of each kind, in turns.
RUNS = 3

#: Settings of the sessions that are not greedy.
SAMPLED: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    options: argparse.Namespace = parser.parse_args()
    passive_threads()
    model = checkpoint(options)
    with fleet(model, "2:-2", "--dtype", "float32") as (address, _):
        report(measure(model, address, options.runs), options.json, f"sampling, {SESSIONS} sessions")


def measure(model: Path, address: str, runs: int = RUNS) -> dict[str, Any]:
    """The median tokens/s of both kinds, and their ratio, `sampling_overhead`.

    Args:
        address: a queue with a worker of the model.
    """
    from split_device import SplitModelForCausalLM
    from split_device.generation.generator import Generator

    rates: dict[str, list[float]] = {"greedy": [], "sampled": []}
    with (
        SplitModelForCausalLM.from_pretrained(model, broker=address, dtype="float32") as split,
        Generator(split, max_requests=2 * SESSIONS, prefix_cache=0, speculate="off") as generator,
    ):
        for run in range(runs + 1):
            for kind in rates:
                rate = _tokens_per_second(split, generator, kind == "sampled")
                note(f"{kind}: {rate:.1f} tokens/s{' (warm-up)' * (not run)}")
                if run:
                    rates[kind].append(rate)
    greedy, sampled = (statistics.median(rates[kind]) for kind in ("greedy", "sampled"))
    return {"sampling_overhead": sampled / greedy, "greedy_tok_s": greedy, "sampled_tok_s": sampled}


def _tokens_per_second(split: Any, generator: Any, sampled: bool) -> float:
    from transformers import GenerationConfig

    from split_device.generation.generator import Request
    from split_device.generation.settings import Sampling

    settings = Sampling(NEW_TOKENS, ignore_eos=True, **(SAMPLED if sampled else {"temperature": 0.0}))
    settings = settings.resolved(split.generation_config)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=settings.ends(()), **settings.options())
    penalties = settings.frequency_penalty or 0.0, settings.presence_penalty or 0.0
    ids = prompt(split.config.vocab_size, SESSIONS * PROMPT_TOKENS)[0].tolist()
    prompts = [ids[begin : begin + PROMPT_TOKENS] for begin in range(0, len(ids), PROMPT_TOKENS)]
    began = time.perf_counter()
    generations = [
        generator.submit(
            Request(
                tokens,
                config,
                seed=seed if sampled else None,
                frequency_penalty=penalties[0],
                presence_penalty=penalties[1],
            )
        )
        for seed, tokens in enumerate(prompts)
    ]
    total = sum(len(generation.result()) for generation in generations)
    return total / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
