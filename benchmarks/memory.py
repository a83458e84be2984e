"""Resident memory of device, worker and unsplit model after 64 tokens, minus that of a process of the same imports.

That process also reads the model's configuration and imports its class, whose code is not small.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import arguments, checkpoint, fleet, generate_greedily, note, prompt, report

PROMPT_TOKENS = 64
NEW_TOKENS = 64
MIB = 2**20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--role", choices=["empty", "device", "unsplit"], help="used by the benchmark itself")
    parser.add_argument("--broker", default="")
    options = parser.parse_args()
    model = checkpoint(options)
    if options.role:
        print(json.dumps({"rss": _measure(options.role, model, options.broker)}), flush=True)
        return

    from split_common.models.loading import read_spec
    from split_common.models.split import Split
    from split_device.models.sizes import parts

    spec = read_spec(str(model))
    sizes = {part.name: part.bytes / MIB for part in parts(spec, Split.from_head_tail(spec.layers, 2, 2))}
    empty = _in_process("empty", model)
    unsplit = _in_process("unsplit", model)
    with fleet(model) as (address, pid):
        device = _in_process("device", model, address)
        worker = psutil.Process(pid).memory_info().rss
    results = {
        "device_mib": (device - empty) / MIB,
        "worker_mib": (worker - empty) / MIB,
        "unsplit_mib": (unsplit - empty) / MIB,
        "device_expected_mib": sizes["head"] + sizes["tail"],
        "worker_expected_mib": sizes["body"],
        "empty_process_mib": empty / MIB,
    }
    report(results, options.json, f"memory after {NEW_TOKENS} tokens")


def _in_process(role: str, model: Path, broker: str = "") -> int:
    note(f"measuring: {role}")
    command = [sys.executable, "-m", "benchmarks.memory", "--role", role, "--model", str(model), "--broker", broker]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(finished.stdout)["rss"])


def _measure(role: str, model: Path, broker: str) -> int:
    import torch
    import transformers

    import split_worker.worker  # noqa: F401
    from split_common.models.loading import read_spec
    from split_device.models.language import SplitModelForCausalLM

    read_spec(str(model))
    if role == "device":
        with SplitModelForCausalLM.from_pretrained(model, broker=broker) as split:
            _generate(split)
            return int(psutil.Process().memory_info().rss)
    if role == "unsplit":
        unsplit = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
        _generate(unsplit)
        return int(psutil.Process().memory_info().rss)
    torch.ones(64, 64) @ torch.ones(64, 64)
    return int(psutil.Process().memory_info().rss)


def _generate(model: Any) -> None:
    generate_greedily(model, prompt(model.config.vocab_size, PROMPT_TOKENS), NEW_TOKENS)


if __name__ == "__main__":
    main()
