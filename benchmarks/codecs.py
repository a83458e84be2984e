"""What each codec of hidden states saves on the wire, and what it costs: in time, and in the model's answers.

The text is the documentation of Python that comes with Python, in prompts of equal length, each of which passes
through the model once: from a device through the broker to a worker and back. What every codec answers is compared
with `exact`: the log-likelihood of the text's next token, and which token is the most likely one.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, counted, fleet, note, report

#: Number of tokens in a prompt, and of those between the beginnings of two prompts.
TOKENS, STRIDE = 512, 5000

#: Bytes per token of the same states in bfloat16 are measured with this many prompts.
BFLOAT16_PROMPTS = 2


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each; default: %(default)s")
    options = parser.parse_args()
    report(measure(options), options.json, "codecs of hidden states")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Keys `CODEC.NAME`: bytes, ΔNLL, share of equal most likely tokens, and milliseconds on the device."""
    from split_common.models.codecs import CODECS

    model = checkpoint(options)
    prompts = texts(model, options.prompts, options.tokens)
    with fleet(model, "2:-2", "--dtype", "bfloat16") as (address, _):
        few = prompts[:BFLOAT16_PROMPTS]
        half = [run["bytes"] for run in _runs(model, address, "exact", few, "bfloat16")]
    results: dict[str, Any] = {"prompts": len(prompts), "tokens": options.tokens}
    with fleet(model, "2:-2", "--dtype", "float32") as (address, _):
        runs = {name: list(_runs(model, address, name, prompts, "float32")) for name in CODECS}
    for direction, way in enumerate(("up", "down")):
        results[f"bfloat16.bytes_{way}_per_token"] = _mean(half, direction) / options.tokens
    for name, measured in runs.items():
        travelled = [run["bytes"] for run in measured]
        for direction, way in enumerate(("up", "down")):
            results[f"{name}.bytes_{way}_per_token"] = _mean(travelled, direction) / options.tokens
            results[f"{name}.{way}_over_bfloat16"] = _mean(travelled, direction) / _mean(half, direction)
        results |= {f"{name}.{key}": value for key, value in _difference(measured, runs["exact"]).items()}
        for stage in ("encode", "decode"):
            results[f"{name}.{stage}_ms"] = 1e3 * statistics.median(run[stage] for run in measured)
    return results


def texts(model: Path, count: int, tokens: int) -> list[Any]:
    """Prompts `[1, tokens]`, int64, of a tokenizer that lies with a model."""
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoTokenizer

    # The whole of it is far longer than a model's context, which tokenizers warn of.
    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=10**9)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text).input_ids)
    stride = min(STRIDE, (len(ids) - tokens) // count)
    return [ids[begin : begin + tokens][None] for begin in range(0, count * stride, stride)]


def _runs(model: Path, address: str, codec: str, prompts: list[Any], dtype: str) -> Iterator[dict[str, Any]]:
    """Of each prompt: bytes up and down, seconds, and for each token the loss and the most likely next one."""
    import torch

    from split_device import SplitModelForCausalLM
    from split_device.sessions import session

    # A message that is sent again, because the machine is busy, would count twice.
    session.RETRANSMIT = session.MAX_RETRANSMIT = 600.0
    note(f"{codec}, {dtype} …")
    with (
        torch.no_grad(),
        counted(address) as (proxy, before),
        SplitModelForCausalLM.from_pretrained(model, broker=before, dtype=dtype, codec=codec) as split,
    ):
        # Sets the channel up.
        split(prompts[0][:, :2], use_cache=False)
        for ids in prompts:
            proxy.up = proxy.down = 0
            split.timings.reset()
            logits = split(ids, use_cache=False).logits[0, :-1].float()
            seconds = split.timings.seconds
            yield {
                "bytes": (proxy.up, proxy.down),
                "encode": seconds["encode"],
                "decode": seconds["decode"],
                "loss": torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"),
                "best": logits.argmax(-1),
            }


def _mean(pairs: list[tuple[int, int]], direction: int) -> float:
    return statistics.mean(pair[direction] for pair in pairs)


def _difference(runs: list[dict[str, Any]], exact: list[dict[str, Any]]) -> dict[str, float]:
    """How far the answers are off: ΔNLL in nats per token with its standard error, and equal most likely tokens."""
    import torch

    losses = torch.cat([run["loss"] - other["loss"] for run, other in zip(runs, exact, strict=True)])
    same = torch.cat([run["best"] == other["best"] for run, other in zip(runs, exact, strict=True)])
    return {
        "delta_nll": losses.mean().item(),
        "delta_nll_error": losses.std().item() / math.sqrt(len(losses)),
        "same_argmax": same.float().mean().item(),
    }


if __name__ == "__main__":
    main()
