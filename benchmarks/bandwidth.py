"""Decoding, compared with the bound of memory bandwidth: the bytes a step must read, at the speed of a large copy.

The body has random weights and runs in this process, without a queue.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import note, now

#: Shapes of bodies: that of Llama 3 8B, and one that is small enough for a test.
SHAPES: dict[str, dict[str, int]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}

#: Number of tokens in each session when it is measured.
CONTEXT = 512

#: Number of steps that are measured, and of those before them that are not.
MEASURED_STEPS, WARM_STEPS = 32, 8

#: Size of the copy that measures the bandwidth, in bytes.
COPY_BYTES = {"cuda": 4 * 1024**3, "cpu": 256 * 1024**2}


def decode(device: str, shape: str, sessions: list[int]) -> dict[str, Any]:
    """For each number of sessions: milliseconds of a step, the bound, and the ratio of bound to measured time."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from split_common.engine.runner import build_runner
    from split_common.models.layer_stack import LayerStack
    from split_common.models.split import Split

    place = torch.device(device)
    bandwidth = _bandwidth(place)
    note(f"a copy moves {bandwidth / 1e9:,.0f} GB/s")
    config = LlamaConfig(**SHAPES[shape], vocab_size=256, max_position_embeddings=4096)
    with place:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    layers = config.num_hidden_layers
    weights = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    token = 2 * 2 * layers * config.num_key_value_heads * config.head_dim
    room = token * 2 * (CONTEXT + MEASURED_STEPS + WARM_STEPS + 256) * max(sessions)
    runner = build_runner(LayerStack(model, layers), Split(layers, 0, layers), config, room)
    results: dict[str, Any] = {}
    for count in sessions:
        seconds = _step(runner, count)
        bound = (weights + count * CONTEXT * token) / bandwidth
        results[str(count)] = {"ms": 1e3 * seconds, "bound_ms": 1e3 * bound, "share": bound / seconds}
        note(f"{count} sessions: {1e3 * seconds:.2f} ms a step, {bound / seconds:.0%} of the bound")
    return {
        "hardware": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "attention": runner.executor.attention,
        "compiled": runner.compiled,
        "copy_gb_s": bandwidth / 1e9,
        "weight_bytes": weights,
        "decode": results,
    }


def _bandwidth(place: Any) -> float:
    """Bytes per second that a large copy reads and writes."""
    import torch

    source = torch.empty(COPY_BYTES[place.type], dtype=torch.uint8, device=place).fill_(1)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        began = now(place)
        target.copy_(source)
        best = min(best, now(place) - began)
    return 2 * source.nbytes / best


def _step(runner: Any, sessions: int) -> float:
    """Seconds of a decoding step. Each ends with the states on the host, as on a worker."""
    import torch

    from split_common.engine.sequences import TokenRun

    rows = [runner.store.new_sequence() for _ in range(sessions)]
    prompt = torch.randn(CONTEXT, runner.width, dtype=runner.dtype)
    for row in rows:
        runner.run([TokenRun(row, prompt, range(CONTEXT))])
    began = 0.0
    for step in range(WARM_STEPS + MEASURED_STEPS):
        if step == WARM_STEPS:
            began = now(runner.device)
        runner.run([TokenRun(row, prompt[:1], [row.length]) for row in rows])
    seconds = (now(runner.device) - began) / MEASURED_STEPS
    for row in rows:
        row.free()
    return seconds
