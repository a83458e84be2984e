"""Many sessions on one worker: tokens/s over the real queue, and how much a long prefill delays a decoding session.

One client process replays recorded hidden states, so that no devices' layers compete for the cores. Then device
processes generate end to end.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bandwidth import SHAPES, decode
from benchmarks.harness import arguments, checkpoint, fleet, generate_greedily, note, report
from split_common.system.process import passive_threads

PROMPT_TOKENS = 64
NEW_TOKENS = 64
LONG_PREFILL = 2048
HEAD = TAIL = 2


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sessions", help="numbers of concurrent sessions; default: 1,2,4,8,16,32, or 1,16,64")
    parser.add_argument("--devices", default="4,8", help="numbers of concurrent device processes, end to end")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="instead, decode with a random body on this device"
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="shape of the random body")
    parser.add_argument("--device-role", metavar="ADDRESS", help="used by the benchmark itself")
    options = parser.parse_args()
    passive_threads()
    if options.device:
        sessions = list(map(int, (options.sessions or "1,16,64").split(",")))
        report(decode(options.device, options.shape, sessions), options.json, f"decoding, {options.shape}")
        return
    options.sessions = options.sessions or "1,2,4,8,16,32"
    model = checkpoint(options)
    if options.device_role:
        _be_a_device(model, options.device_role)
        return
    report(_measure(model, options), options.json, f"concurrency, {PROMPT_TOKENS} + {NEW_TOKENS} tokens")


def _measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    states = _record_states(model)
    plain = _plain_body(model, states)
    note(f"plain body: {plain:.1f} tokens/s")
    unsplit = _unsplit(model)
    note(f"unsplit: {unsplit:.1f} tokens/s")
    body: dict[str, float] = {}
    with fleet(model, f"{HEAD}:{-TAIL}", "--dtype", "float32") as (address, _), Driver(model, address) as driver:
        driver.sessions(2, states)  # warm
        for count in map(int, options.sessions.split(",")):
            body[str(count)] = driver.sessions(count, states)
            note(f"{count} sessions: {body[str(count)]:.1f} tokens/s")
        quiet, disturbed = driver.inter_token_latency(states)
        note(f"inter-token p99: {quiet:.1f} ms, with a prefill {disturbed:.1f} ms")
    end_to_end = {}
    for count in map(int, filter(None, options.devices.split(","))):
        end_to_end[str(count)] = _end_to_end(model, count)
        note(f"{count} devices: {end_to_end[str(count)]:.1f} tokens/s")
    return {
        "body_tok_s": body,
        "plain_body_tok_s": plain,
        "single_ratio": body.get("1", 0.0) / plain,
        "speedup_16": body.get("16", 0.0) / plain,
        "end_to_end_tok_s": end_to_end,
        "unsplit_tok_s": unsplit,
        "ratio_8": end_to_end.get("8", 0.0) / unsplit,
        "itl_p99_ms": quiet,
        "itl_p99_prefill_ms": disturbed,
        "itl_ratio": disturbed / quiet,
    }


def _record_states(model: Path) -> Any:
    """Hidden states `[LONG_PREFILL, width]` after the head, for random tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    full.model.layers = full.model.layers[:HEAD]
    full.model.norm = torch.nn.Identity()
    torch.manual_seed(0)
    with torch.no_grad():
        return full.model(torch.randint(100, full.config.vocab_size, (1, LONG_PREFILL)), use_cache=False)[0][0]


def _plain_body(model: Path, states: Any) -> float:
    """Tokens/s of the body as transformers' own layers, with one session in this process."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    full.model.layers = full.model.layers[HEAD:-TAIL]
    rates = []
    for _ in range(4):
        cache = DynamicCache()
        began = time.perf_counter()
        with torch.no_grad():
            for begin, end in _steps():
                positions = torch.arange(begin, end)[None]
                full.model(
                    inputs_embeds=states[None, begin:end], position_ids=positions, cache=cache, use_cache=True
                )
        rates.append(NEW_TOKENS / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def _steps() -> list[tuple[int, int]]:
    decode = [(position, position + 1) for position in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS)]
    return [(0, PROMPT_TOKENS), *decode]


def _unsplit(model: Path) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rates = [_generate(full) for _ in range(4)]
    return statistics.median(rates[1:])


def _generate(model: Any) -> float:
    import torch

    prompt = torch.randint(100, model.config.vocab_size, (1, PROMPT_TOKENS))
    began = time.perf_counter()
    generate_greedily(model, prompt, NEW_TOKENS)
    return NEW_TOKENS / (time.perf_counter() - began)


class Driver:
    """A client without a model, which replays hidden states in many sessions."""

    def __init__(self, model: Path, address: str) -> None:
        from split_common.models.loading import read_spec
        from split_common.models.split import Split
        from split_common.models.verification import find_manifest
        from split_common.protocol import headers
        from split_common.transport import connect
        from split_common.trust.fleet import load_fleet
        from split_device.sessions.client import Client

        fleet_ = load_fleet()
        identity = fleet_.identity("device")
        spec = read_spec(str(model))
        split = Split.from_head_tail(spec.layers, HEAD, TAIL)
        manifest = find_manifest(fleet_, spec.checkpoint, spec.own_tensors(split, "device"))
        service = headers.Service(manifest.root, split.first, split.last)
        transport = connect(address, fleet_, identity)
        self.client = Client(transport, fleet_, identity, service, manifest.name, "float32")
        self.client.start()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def sessions(self, count: int, states: Any) -> float:
        """Tokens/s of `count` sessions at once."""
        threads = [threading.Thread(target=self._replay, args=(states,)) for _ in range(count)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count * NEW_TOKENS / (time.perf_counter() - began)

    def _replay(
        self, states: Any, tokens: int = NEW_TOKENS, on_step: Callable[[float], None] = lambda _: None
    ) -> None:
        session = self.client.open_session()
        begin, end = 0, PROMPT_TOKENS
        while end <= PROMPT_TOKENS + tokens:
            began = time.perf_counter()
            session.call([self._step(states, begin, end, session.acked)])
            if begin:
                on_step(time.perf_counter() - began)
            begin, end = end, end + 1
        session.close()

    @staticmethod
    def _step(states: Any, begin: int, end: int, acked: int) -> tuple[Any, Any]:
        from split_common.models.tensors import to_bytes
        from split_common.protocol import payloads

        row = payloads.Run(0, begin, list(range(begin, end)))
        return payloads.Step("float32", states.shape[1], [row], None, acked), to_bytes(states[begin:end])

    def inter_token_latency(self, states: Any) -> tuple[float, float]:
        """99th percentile in ms for one decoding session: alone, and beside a series of long prefills."""
        alone: list[float] = []
        self._replay(states, 4 * NEW_TOKENS, alone.append)
        disturbed: list[float] = []
        stop = threading.Event()
        during = threading.Event()

        def prefill() -> None:
            while not stop.is_set():
                session = self.client.open_session()
                during.set()
                session.call([self._step(states, 0, LONG_PREFILL // 2, 0)])
                session.call([self._step(states, LONG_PREFILL // 2, LONG_PREFILL, session.acked)])
                session.close()

        thread = threading.Thread(target=prefill)
        thread.start()
        during.wait()
        self._replay(states, 2 * NEW_TOKENS, disturbed.append)
        stop.set()
        thread.join()
        return _p99(alone), _p99(disturbed)


def _p99(seconds: list[float]) -> float:
    return 1000 * statistics.quantiles(seconds, n=100)[98]


def _end_to_end(model: Path, count: int) -> float:
    """Tokens/s of `count` device processes that generate at once."""
    with fleet(model, f"{HEAD}:{-TAIL}", "--dtype", "float32") as (address, _):
        command = [sys.executable, "-m", "benchmarks.concurrency", "--model", str(model), "--device-role", address]
        devices = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        try:
            for device in devices:
                _read(device)
            began = time.perf_counter()
            for device in devices:
                assert device.stdin is not None
                device.stdin.write("go\n")
                device.stdin.flush()
            for device in devices:
                _read(device)
            return count * NEW_TOKENS / (time.perf_counter() - began)
        finally:
            for device in devices:
                device.kill()
                device.communicate()


def _read(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError("a device process ended early")


def _be_a_device(model: Path, address: str) -> None:
    import torch

    from split_device import SplitModelForCausalLM

    torch.set_num_threads(1)
    with SplitModelForCausalLM.from_pretrained(model, broker=address, dtype="float32", timeout=60) as split:
        _generate(split)
        print("ready", flush=True)
        sys.stdin.readline()
        _generate(split)
        print("done", flush=True)


if __name__ == "__main__":
    main()
