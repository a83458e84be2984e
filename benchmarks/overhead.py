"""Overhead of the split for one stream: tokens/s of split and unsplit generation, alternating in the same run."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.harness import arguments, checkpoint, counted, fleet, generate_greedily, note, prompt, report
from split_common.system.process import passive_threads
from split_device.stress.proxy import Proxy

PROMPT_TOKENS = 64
NEW_TOKENS = 64


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

    with fleet(model, "2:-2", "--dtype", "float32") as (address, _):
        with SplitModelForCausalLM.from_pretrained(model, broker=address, dtype="float32") as split:
            identical = torch.equal(generate(split), generate(unsplit))
            seconds: dict[str, list[float]] = {"split": [], "unsplit": []}
            split.timings.reset()
            for round_ in range(options.rounds):
                for name, which in (("split", split), ("unsplit", unsplit)):
                    began = time.perf_counter()
                    generate(which)
                    seconds[name].append(time.perf_counter() - began)
                note(f"round {round_ + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()))
            stages = split.timings.per_step_ms()
        with (
            counted(address) as (proxy, before),
            SplitModelForCausalLM.from_pretrained(model, broker=before, dtype="float32") as split,
        ):
            up, down = _decode_bytes(split, generate, proxy)

    tensor = unsplit.config.hidden_size * 4
    rates = {name: [NEW_TOKENS / value for value in values] for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(rates["split"], rates["unsplit"], strict=True)]
    results = {
        "split_tok_s": statistics.median(rates["split"]),
        "unsplit_tok_s": statistics.median(rates["unsplit"]),
        "ratio": statistics.median(ratios),
        "bytes_per_token_up": up,
        "bytes_per_token_down": down,
        "payload_efficiency": 2 * tensor / (up + down),
        "identical": identical,
        "threads": torch.get_num_threads(),
        "stages_ms": {stage: round(value, 3) for stage, value in stages.items()},
    }
    report(results, options.json, f"overhead, {PROMPT_TOKENS} + {NEW_TOKENS} tokens")


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
