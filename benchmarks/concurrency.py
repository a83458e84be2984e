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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bandwidth import SHAPES, decode
from benchmarks.harness import (
    arguments,
    checkpoint,
    fleet,
    generate_greedily,
    in_turns,
    prompt,
    ratios,
    report,
    summary,
)
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
    parser.add_argument("--rounds", type=int, default=3, help="number of times that each is measured, in turns")
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
    counts = list(map(int, options.sessions.split(",")))
    devices = list(map(int, filter(None, options.devices.split(","))))
    states = _record_states(model)
    plain, unsplit = _plain_body(model, states), _unsplit(model)
    with (
        fleet(model, f"{HEAD}:{-TAIL}", "--dtype", "float32") as (address, _),
        Driver(model, address) as driver,
        Devices(model, address, max(devices, default=0)) as running,
    ):
        plain()  # warm
        unsplit()
        driver.sessions(2, states)
        rounds = in_turns(
            options.rounds,
            {
                "plain_body_tok_s": plain,
                **{f"body_{count}": partial(driver.sessions, count, states) for count in counts},
                "itl_p99_ms": partial(driver.inter_token_latency, states),
                "itl_p99_prefill_ms": partial(driver.inter_token_latency, states, beside_prefills=True),
                "unsplit_tok_s": unsplit,
                **{f"devices_{count}": partial(running.generate, count) for count in devices},
            },
        )
    alone, body = rounds["plain_body_tok_s"], {count: rounds.pop(f"body_{count}") for count in counts}
    end_to_end = {count: rounds.pop(f"devices_{count}") for count in devices}
    figures = dict(rounds) | {"itl_ratio": ratios(rounds["itl_p99_prefill_ms"], rounds["itl_p99_ms"])}
    for name, count, of in (("single_ratio", 1, body), ("speedup_16", 16, body), ("ratio_8", 8, end_to_end)):
        if count in of:
            figures[name] = ratios(of[count], alone if of is body else rounds["unsplit_tok_s"])
    return {
        "body_tok_s": {str(count): statistics.median(rates) for count, rates in body.items()},
        "end_to_end_tok_s": {str(count): statistics.median(rates) for count, rates in end_to_end.items()},
        **summary(figures),
    }


def _record_states(model: Path) -> Any:
    """Hidden states `[LONG_PREFILL, width]` after the head, for random tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    full.model.layers = full.model.layers[:HEAD]
    full.model.norm = torch.nn.Identity()
    with torch.no_grad():
        return full.model(prompt(full.config.vocab_size, LONG_PREFILL), use_cache=False)[0][0]


def _plain_body(model: Path, states: Any) -> Callable[[], float]:
    """Measures tokens/s of the body as transformers' own layers, with one session in this process."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    full.model.layers = full.model.layers[HEAD:-TAIL]
    for index, layer in enumerate(full.model.layers):
        layer.self_attn.layer_idx = index

    def rate() -> float:
        cache = DynamicCache()
        began = time.perf_counter()
        with torch.no_grad():
            for begin, end in _steps():
                full.model(
                    inputs_embeds=states[None, begin:end],
                    position_ids=torch.arange(begin, end)[None],
                    cache=cache,
                    use_cache=True,
                )
        assert cache.get_seq_length() == end
        return NEW_TOKENS / (time.perf_counter() - began)

    return rate


def _steps() -> list[tuple[int, int]]:
    decode = [(position, position + 1) for position in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS)]
    return [(0, PROMPT_TOKENS), *decode]


def _unsplit(model: Path) -> Callable[[], float]:
    """Measures tokens/s of the unsplit model, one stream in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    return partial(_generate, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())


def _generate(model: Any) -> float:
    ids = prompt(model.config.vocab_size, PROMPT_TOKENS)
    began = time.perf_counter()
    generate_greedily(model, ids, NEW_TOKENS)
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

    def inter_token_latency(self, states: Any, beside_prefills: bool = False) -> float:
        """99th percentile in ms for one decoding session: alone, or beside a series of long prefills."""
        seconds: list[float] = []
        if not beside_prefills:
            self._replay(states, 4 * NEW_TOKENS, seconds.append)
            return _p99(seconds)
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
        self._replay(states, 2 * NEW_TOKENS, seconds.append)
        stop.set()
        thread.join()
        return _p99(seconds)


def _p99(seconds: list[float]) -> float:
    return 1000 * statistics.quantiles(seconds, n=100)[98]


class Devices:
    """Device processes that generate when they are told to. A context manager, which ends them."""

    def __init__(self, model: Path, address: str, count: int) -> None:
        command = [sys.executable, "-m", "benchmarks.concurrency", "--model", str(model), "--device-role", address]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]

    def __enter__(self) -> Devices:
        for process in self._processes:
            _read(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def generate(self, count: int) -> float:
        """Tokens/s of the first `count` of them, all at once."""
        running = self._processes[:count]
        began = time.perf_counter()
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in running:
            _read(process)
        return count * NEW_TOKENS / (time.perf_counter() - began)


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
        for _ in sys.stdin:
            _generate(split)
            print("done", flush=True)


if __name__ == "__main__":
    main()
