"""What agents ask of an endpoint: long conversations sent whole at every turn, and beginnings that requests share.

`turns` is a conversation whose every turn sends all that was said, with the prefix cache and without it: the bytes
that go to the queue, and the seconds to the first token of the last turn. `shared_prefix` is many requests at once
with a common beginning: the tokens of prompts that are computed, over all of them. `structured` and `sampling` are
those of `benchmarks.agents_structured` and `benchmarks.agents_sampling`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, counted, exact_request, fleet, note, report
from split_common.system.process import passive_threads
from split_device.stress.proxy import Proxy

#: What can be measured.
PARTS = ("turns", "shared_prefix", "structured", "sampling")

#: Number of tokens that each of the requests with a common beginning generates.
ANSWER = 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--turn-tokens", type=int, default=100, help="tokens of each question and of each answer")
    parser.add_argument("--requests", type=int, default=32, help="requests with a common beginning")
    parser.add_argument("--common", type=int, default=1000, help="tokens of the common beginning")
    parser.add_argument("--own", type=int, default=40, help="tokens of each request after it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    passive_threads()
    report(measure(checkpoint(options), options), options.json, "agents")


def measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    from split_device import SplitModelForCausalLM

    results: dict[str, Any] = {}
    with fleet(model, "2:-2", "--dtype", "float32") as (address, _):
        with (
            counted(address) as (proxy, before),
            SplitModelForCausalLM.from_pretrained(model, broker=before, dtype="float32") as split,
        ):
            if "turns" in options.parts:
                results |= _turns(split, proxy, options)
            if "shared_prefix" in options.parts:
                results |= _shared_prefix(split, options)
            if "structured" in options.parts:
                results |= _structured(split, model)
        if "sampling" in options.parts and importlib.util.find_spec("benchmarks.agents_sampling") is not None:
            results |= importlib.import_module("benchmarks.agents_sampling").measure(model, address)
    return results


def _structured(split: Any, model: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from benchmarks.agents_structured import forced, mask_us_per_token

    tokenizer = AutoTokenizer.from_pretrained(model)
    return {"forced": forced(split, tokenizer), "mask_us_per_token": mask_us_per_token(split, tokenizer)}


def _turns(split: Any, proxy: Proxy, options: argparse.Namespace) -> dict[str, Any]:
    cached, cached_seconds, cached_tokens, answers = _conversation(split, proxy, options, None)
    note(f"with the cache: {cached:,} bytes, {cached_seconds:.3f} s to the first token of the last turn")
    plain, plain_seconds, _, expected = _conversation(split, proxy, options, 0)
    note(f"without it: {plain:,} bytes, {plain_seconds:.3f} s")
    return {
        "bytes_ratio": cached / plain,
        "prefill_ratio": cached_seconds / plain_seconds,
        "bytes_cached": cached,
        "bytes_plain": plain,
        "first_token_s_cached": cached_seconds,
        "first_token_s_plain": plain_seconds,
        "cached_tokens": cached_tokens,
        "identical": answers == expected,
    }


def _conversation(
    split: Any, proxy: Proxy, options: argparse.Namespace, prefix_cache: int | None
) -> tuple[int, float, int, list[int]]:
    """Bytes to the queue, seconds to the first token of the last turn, its cached tokens, and all that was said."""
    from split_device.generation.generator import Generator

    tokens = _tokens(split.config.vocab_size)
    said: list[int] = []
    seconds = 0.0
    with Generator(split, prefix_cache=prefix_cache, speculate="off") as generator:
        before = proxy.up
        for turn in range(options.turns):
            said += itertools.islice(tokens, options.turn_tokens)
            began = time.perf_counter()
            generation = generator.submit(exact_request(said, options.turn_tokens))
            next(iter(generation))
            seconds = time.perf_counter() - began
            said += generation.result()
            note(f"turn {turn + 1}: {seconds:.3f} s to the first token, {generation.cached_tokens} tokens cached")
        sent = proxy.up - before
    return sent, seconds, generation.cached_tokens, said


def _shared_prefix(split: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The tokens of prompts that are computed, over all tokens of the prompts."""
    from split_device.generation.generator import Generator

    tokens = _tokens(split.config.vocab_size)
    common = list(itertools.islice(tokens, options.common))
    prompts = [[*common, *itertools.islice(tokens, options.own)] for _ in range(options.requests)]
    with Generator(split, max_requests=2 * options.requests, speculate="off") as generator:
        began = time.perf_counter()
        generations = [generator.submit(exact_request(prompt, ANSWER)) for prompt in prompts]
        for generation in generations:
            generation.result()
        seconds = time.perf_counter() - began
    every = sum(map(len, prompts))
    computed = every - sum(generation.cached_tokens for generation in generations)
    note(f"{computed:,} of {every:,} tokens of prompts computed, in {seconds:.1f} s")
    return {"prefill_tokens_ratio": computed / every, "prefill_tokens": computed, "shared_prefix_s": seconds}


def _tokens(vocabulary: int) -> Iterator[int]:
    draw = random.Random(0)
    first = min(100, vocabulary // 2)
    while True:
        yield draw.randrange(first, vocabulary)


if __name__ == "__main__":
    main()
