"""Overhead of the split for one stream: tokens/s of split and unsplit generation, alternating in the same run."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import Any

from benchmarks.harness import (
    arguments,
    checkpoint,
    compiled,
    counted,
    fleet,
    generate_greedily,
    in_turns,
    prompt,
    ratios,
    report,
    summary,
)
from split_common.system.process import passive_threads
from split_device.stress.proxy import Proxy

PROMPT_TOKENS = 64
NEW_TOKENS = 64

#: Tokens of the prompts whose first token is waited for, and most pairs of them.
LONG_PROMPT, LONG_PAIRS = 1800, 3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="number of pairs of generations")
    options = parser.parse_args()
    passive_threads()

    import torch
    from transformers import AutoModelForCausalLM

    from split_device import SplitModelForCausalLM

    model = checkpoint(options)
    unsplit = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = prompt(unsplit.config.vocab_size, PROMPT_TOKENS)

    def generate(which: Any, tokens: int = NEW_TOKENS) -> Any:
        return generate_greedily(which, ids, tokens)

    def rate(which: Any) -> float:
        began = time.perf_counter()
        generate(which)
        return NEW_TOKENS / (time.perf_counter() - began)

    compiled(model)
    with fleet(model, "2:-2", "--dtype", "float32") as (address, _):
        with SplitModelForCausalLM.from_pretrained(model, broker=address, dtype="float32") as split:
            identical = torch.equal(generate(split), generate(unsplit))
            split.timings.reset()
            rates = in_turns(options.rounds, {"split": partial(rate, split), "unsplit": partial(rate, unsplit)})
            stages = split.timings.per_step_ms()
            firsts = _first_tokens(split, unsplit, min(options.rounds, LONG_PAIRS))
        with (
            counted(address) as (proxy, before),
            SplitModelForCausalLM.from_pretrained(model, broker=before, dtype="float32") as split,
        ):
            up, down = _decode_bytes(split, generate, proxy)

    tensor = unsplit.config.hidden_size * 4
    figures = {
        "split_tok_s": rates["split"],
        "unsplit_tok_s": rates["unsplit"],
        "ratio": ratios(rates["split"], rates["unsplit"]),
        "split_prefill_s": firsts["split"],
        "unsplit_prefill_s": firsts["unsplit"],
        "prefill_ratio": ratios(firsts["split"], firsts["unsplit"]),
    }
    results = {
        **summary(figures),
        "bytes_per_token_up": up,
        "bytes_per_token_down": down,
        "payload_efficiency": 2 * tensor / (up + down),
        "identical": identical,
        "threads": torch.get_num_threads(),
        "stages_ms": {stage: round(value, 3) for stage, value in stages.items()},
    }
    report(results, options.json, f"overhead, {PROMPT_TOKENS} + {NEW_TOKENS} tokens")


def _first_tokens(split: Any, unsplit: Any, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token after long prompts, in turns; each has a prompt of its own."""
    tokens = min(LONG_PROMPT, unsplit.config.max_position_embeddings - 1)
    ids = prompt(unsplit.config.vocab_size, tokens)
    shifts = itertools.count(1)

    def seconds(which: Any) -> float:
        fresh = ids.roll(next(shifts), 1)
        began = time.perf_counter()
        generate_greedily(which, fresh, 1)
        return time.perf_counter() - began

    return in_turns(rounds, {"split": partial(seconds, split), "unsplit": partial(seconds, unsplit)})


def _decode_bytes(split: Any, generate: Any, proxy: Proxy) -> tuple[float, float]:
    """Bytes on the wire per decoded token, up and down: the difference of a long and a short generation."""
    totals = []
    for tokens in (1, 1 + NEW_TOKENS):
        before = proxy.up, proxy.down
        generate(split, tokens)
        time.sleep(0.2)
        totals.append((proxy.up - before[0], proxy.down - before[1]))
    (short_up, short_down), (long_up, long_down) = totals
    return (long_up - short_up) / NEW_TOKENS, (long_down - short_down) / NEW_TOKENS


if __name__ == "__main__":
    main()
