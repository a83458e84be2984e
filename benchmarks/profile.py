"""Where a step of the body goes on this CPU: products, attention, other operators and Python, for some sessions.

Layers that are fused have one stage for all operators.

The bound is the time to read all weights once, at the bandwidth that the same run measures. What surrounds the body
(queue, encryption, head and tail) is in `benchmarks.overhead`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, checkpoint, compiled, note, report, spread
from split_common.system.process import passive_threads, reuse_memory

#: Tokens that each session has before the steps that are measured.
CONTEXT = 96

#: Bytes of the buffer whose reading gives the bandwidth: more than caches hold.
BUFFER = 256 * 2**20

#: Memory for keys and values.
KV_BYTES = 2**29

#: Operators of each stage, by their names in torch's profiler. All others are `other`.
STAGES = {
    "products": ("aten::addmm", "aten::mm", "aten::addmv_", "mkldnn::_linear_pointwise", "aten::mkldnn_linear"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::bmm",
        "aten::_softmax",
        "aten::index_select",
        "aten::index_copy_",
    ),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sessions", default="1,4,16,64", help="numbers of sessions")
    parser.add_argument("--layers", default="2:-2", help="the body's layers")
    parser.add_argument("--steps", type=int, default=30, help="number of steps that are measured")
    parser.add_argument("--tune", choices=["on", "off"], default="on", help="as of `lambda-split worker`")
    options = parser.parse_args()
    passive_threads()
    reuse_memory()
    results = _measure(checkpoint(options), options)
    report(results, options.json, "where a step of the body goes")


def _measure(model: Path, options: Any) -> dict[str, Any]:
    import torch

    from split_common.engine.linear import pack_linears
    from split_common.engine.runner import build_runner
    from split_common.models.loading import load_part, read_spec
    from split_common.models.split import Split

    if options.tune == "on":
        compiled(model)
    spec = read_spec(str(model))
    split = Split.parse(spec.layers, options.layers)
    part, stack = load_part(spec, split, "worker", dtype=torch.float32)
    weights = sum(parameter.nbytes for parameter in part.parameters())
    tuning = pack_linears(part, stack, measure=options.tune == "on")
    runner = build_runner(stack, split, spec.text_config, KV_BYTES, tuning)
    bandwidth = _bandwidth()
    bound = 1e3 * weights / bandwidth
    results: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "tuning": tuning.describe(),
        "fusion": runner.executor.fusion,
        "weight_bytes": weights,
        "read_gb_s": bandwidth / 1e9,
        "bound_ms": bound,
        "steps_ms": {},
        "steps_ms_spread": {},
    }
    for count in map(int, options.sessions.split(",")):
        steps = _Steps(runner, count)
        stages, quartiles = steps.stages(options.steps)
        results["steps_ms"][str(count)] = stages
        results["steps_ms_spread"][str(count)] = quartiles
        results[f"bound_ratio_{count}"] = stages["step"] / bound
        note(f"{count} sessions: " + ", ".join(f"{name} {value:.1f} ms" for name, value in stages.items()))
        steps.free()
    return results


class _Steps:
    """Decoding steps of some sessions."""

    def __init__(self, runner: Any, count: int) -> None:
        import torch

        from split_common.engine.sequences import TokenRun

        self._runner, self._run = runner, TokenRun
        self._rows = [runner.store.new_sequence() for _ in range(count)]
        generator = torch.Generator().manual_seed(0)
        self._states = [torch.randn(1, runner.width, generator=generator) for _ in range(count)]
        for row in self._rows:
            prompt = torch.randn(CONTEXT, runner.width, generator=generator)
            runner.run([TokenRun(row, prompt, range(CONTEXT))])

    def once(self) -> None:
        """One step. Its tokens are taken back, so that all steps see as many."""
        pairs = zip(self._rows, self._states, strict=True)
        self._runner.run([self._run(row, states, [CONTEXT]) for row, states in pairs])
        for row in self._rows:
            row.truncate(CONTEXT)

    def stages(self, steps: int) -> tuple[dict[str, float], list[float]]:
        """Milliseconds of a step, median, and of its parts, by the shares that torch's profiler sees.

        Returns them with the quartiles of a step.
        """
        from torch.profiler import ProfilerActivity, profile

        for _ in range(3):
            self.once()
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            self.once()
            seconds.append(time.perf_counter() - began)
        step = 1e3 * statistics.median(seconds)
        quartiles = [1e3 * quartile for quartile in spread(seconds)]
        if (fused := getattr(self._runner.executor, "fused", None)) is not None:
            return {"step": step, **self._fused_stages(fused.all, steps, step)}, quartiles
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                self.once()
        whole = time.perf_counter() - began
        return {"step": step, **_shares(profiler.key_averages(), whole, step)}, quartiles

    def _fused_stages(self, fused: Any, steps: int, step: float) -> dict[str, float]:
        """Milliseconds of a step in the call that computes all layers, and around it."""
        seconds: list[float] = []
        run = fused.call

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(*arguments)
            finally:
                seconds.append(time.perf_counter() - began)

        fused.call = timed
        try:
            for _ in range(steps):
                self.once()
        finally:
            fused.call = run
        layers = min(step, 1e3 * statistics.median(seconds))
        return {"layers": layers, "python": step - layers}

    def free(self) -> None:
        for row in self._rows:
            row.free()


def _shares(events: Sequence[Any], whole: float, step: float) -> dict[str, float]:
    """Milliseconds of each stage.

    Args:
        events: of the profiler, with microseconds.
        whole: seconds that the profiler ran.
        step: milliseconds of a step without it.
    """
    spent = dict.fromkeys((*STAGES, "other"), 0.0)
    for event in events:
        stage = next((name for name, operators in STAGES.items() if event.key in operators), "other")
        spent[stage] += event.self_cpu_time_total / 1e6
    spent["python"] = max(0.0, whole - sum(spent.values()))
    total = sum(spent.values())
    return {name: step * seconds / total for name, seconds in spent.items()}


def _bandwidth() -> float:
    """Bytes per second at which this process reads memory, the best of a few tries."""
    import torch

    buffer = torch.ones(BUFFER // 4)
    least = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        buffer.sum()
        least = min(least, time.perf_counter() - began)
    return BUFFER / least


if __name__ == "__main__":
    main()
