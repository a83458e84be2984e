"""Which layout of weights is fastest on this CPU, and how many rows to compute for a few: measured, not assumed.

The measurements are of the products of a model alone. They are kept in the cache, for each machine and each set of
shapes, so only a first start takes the time.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
import torch

from split_common.engine.fused_sketch import Sketch
from split_common.errors import ConfigError, KeysError
from split_common.system.files import cache_dir, private_dir, write_private

log = logging.getLogger(__name__)

_Name = TypeVar("_Name")

#: How a weight lies in memory: as in the checkpoint, or in oneDNN's blocks.
Layout = Literal["plain", "onednn"]

#: Numbers of rows that are measured: a session that decodes, a few, many, and a part of a prompt.
ROWS = (1, 2, 4, 16, 64)

#: Most bytes of a weight that are measured. How long a row takes is proportional to the outputs.
SAMPLE_BYTES = 16 * 2**20

#: Bytes of all weights from which on measuring is worth a second.
LEAST_BYTES = 16 * 2**20

#: Bytes that are read between two rounds, so that no weight is found in the caches of a core.
FLUSH_BYTES = 32 * 2**20

#: Most seconds of measuring for each number of rows, once it has had the least number of rounds.
SECONDS = 0.15

#: Least and most rounds of measuring for each number of rows. The first two compile kernels and fill caches.
LEAST_ROUNDS, ROUNDS = 10, 16

#: Least rounds of measuring candidates that take long.
FEW_ROUNDS = 6

#: How much faster more rows have to be than fewer, for fewer to be computed as more.
WORTH_PADDING = 0.95


class Product(NamedTuple):
    """What a linear layer computes, and in which dtype."""

    inputs: int
    outputs: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.inputs}x{self.outputs} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Tuning:
    """What was chosen.

    Args:
        layouts: of each product.
        rows: of products in oneDNN's layout, how many rows to compute for a few; others are computed as they are.
        measured: whether it was, or is what holds without measuring.
        joined: how many products compute several layers of one input.
    """

    layouts: Mapping[Product, Layout] = field(default_factory=dict)
    rows: Mapping[Product, Mapping[int, int]] = field(default_factory=dict)
    measured: bool = False
    joined: int = 0
    #: Layers that may be fused, by index: their weights stay as stored, and are not measured.
    sketches: Mapping[int, Sketch] = field(default_factory=dict)

    def layout(self, product: Product) -> Layout:
        return self.layouts.get(product, "onednn")

    def padded(self, rows: int) -> int:
        """The number of rows of a whole forward with `rows` rows: at most a quarter more.

        Numbers are few where kernels are compiled for each. MKL's, for fp32 as it is stored, are not.
        """
        compiles = not self.layouts or any(
            layout == "onednn" or product.dtype != torch.float32 for product, layout in self.layouts.items()
        )
        step = 1 << max(0, (rows - 1).bit_length() - 3) if compiles else 1
        return -(-rows // step) * step

    def describe(self) -> str:
        """What was chosen, in a few words."""
        layouts = list(self.layouts.values())
        padded = sum(bool(rows) for rows in self.rows.values())
        return (
            f"weights of {layouts.count('plain')} shapes stay as stored, of {layouts.count('onednn')} they are "
            f"in oneDNN's layout (for {padded}, few rows are padded to more); {self.joined} products join several "
            "layers"
        )


#: What holds where nothing was measured.
UNMEASURED = Tuning()


#: Seconds that a product takes, by its name, layout and number of rows.
Times = dict[str, dict[str, dict[int, float]]]

#: Seconds that candidates take, by their name and the number of rows.
CandidateTimes = dict[str, dict[int, float]]

#: Computes rows `[rows, inputs]` by a weight of one layout.
Apply = Callable[[torch.Tensor], torch.Tensor]


def from_environment() -> bool:
    """Whether the head and tail of a device are to be measured: not if `LAMBDA_SPLIT_TUNE` is `off`.

    Raises:
        ConfigError: it is neither `on` nor `off`.
    """
    value = os.environ.get("LAMBDA_SPLIT_TUNE") or "on"
    if value not in ("on", "off"):
        raise ConfigError(f"invalid LAMBDA_SPLIT_TUNE {value!r}: expected on or off")
    return value == "on"


def tune(
    products: Collection[Product],
    sample: Callable[[Product], torch.Tensor],
    apply: Callable[[torch.Tensor, Layout], Apply],
) -> Tuning:
    """Chooses layouts and rows for the products of a model.

    Args:
        products: the kinds that there are.
        sample: the weight `[outputs, inputs]` of one.
        apply: computes rows by a weight in a layout. Raises RuntimeError if there is no such layout here.
    """
    place = _place(products)
    times = _read(place, products)
    if times is None:
        times = _measure(products, sample, apply)
        _keep(place, times)
    return choose(times, products)


def choose(times: Times, products: Collection[Product]) -> Tuning:
    """The choice that follows from measured times.

    A product gets the layout that is least behind the faster one, over all numbers of rows. In oneDNN's layout, few
    rows are computed as more if that takes less time.
    """
    layouts: dict[Product, Layout] = {}
    rows: dict[Product, dict[int, int]] = {}
    for product in products:
        plain, onednn = times[str(product)]["plain"], times[str(product)].get("onednn")
        layouts[product] = "plain"
        if onednn is None:
            continue
        fastest = {few: _fastest(onednn, few) for few in ROWS}
        ratios = [onednn[fastest[few]] / plain[few] for few in ROWS]
        if sum(max(1.0, ratio) for ratio in ratios) < sum(max(1.0, 1 / ratio) for ratio in ratios):
            layouts[product] = "onednn"
            rows[product] = {
                count: more
                for few, more in fastest.items()
                for count in range(few, more)
                if count < min([*(other for other in ROWS if other > few), more])
            }
    return Tuning(layouts, rows, measured=True)


def _fastest(times: Mapping[int, float], few: int) -> int:
    """The number of rows, at most four times as many, that takes clearly less time than a few; else the few."""
    best = min((more for more in times if few <= more <= 4 * few), key=lambda more: times[more])
    return best if times[best] < WORTH_PADDING * times[few] else few


@torch.inference_mode()
def _measure(
    products: Collection[Product],
    sample: Callable[[Product], torch.Tensor],
    apply: Callable[[torch.Tensor, Layout], Apply],
) -> Times:
    """The least seconds of each product in each layout, in turns with all others."""
    candidates: list[tuple[Product, Layout, Apply]] = []
    for product in products:
        weight = sample(product)
        weight = weight[: max(1, SAMPLE_BYTES // weight[:1].nbytes)].clone()
        candidates.append((product, "plain", apply(weight, "plain")))
        try:
            candidates.append((product, "onednn", apply(weight, "onednn")))
        except (RuntimeError, AttributeError, KeyError) as error:
            log.info("oneDNN's layout is not measured: %s", error)
    times: Times = {}
    for rows in ROWS:
        states = {product: torch.randn(1, rows, product.inputs).to(product.dtype) for product in products}
        runs = {
            (str(product), layout): functools.partial(run, states[product]) for product, layout, run in candidates
        }
        for (name, layout), seconds in _least_seconds(runs, LEAST_ROUNDS).items():
            times.setdefault(name, {}).setdefault(layout, {})[rows] = seconds
    return times


def in_turns(
    candidates: Mapping[str, Callable[[int], Callable[[], object]]], counts: Sequence[int]
) -> CandidateTimes:
    """The least seconds of each candidate for each number of rows, in turns, with nothing in the caches of a core.

    Args:
        candidates: by their names; each makes what is to be timed for a number of rows.
        counts: the numbers of rows.
    """
    times: CandidateTimes = {name: {} for name in candidates}
    for count in counts:
        runs = {name: make(count) for name, make in candidates.items()}
        for name, seconds in _least_seconds(runs, FEW_ROUNDS, flush_each=True).items():
            times[name][count] = seconds
    return times


def _least_seconds(
    runs: Mapping[_Name, Callable[[], object]], least_rounds: int, *, flush_each: bool = False
) -> dict[_Name, float]:
    """The least seconds of each run, in turns.

    Args:
        runs: by their names.
        least_rounds: how many turns there are at least.
        flush_each: whether the caches of a core are emptied before each run, and not only before each turn.
    """
    flush = torch.zeros(FLUSH_BYTES // 4)
    least: dict[_Name, float] = {}
    ends = time.perf_counter() + SECONDS
    for turn in range(ROUNDS):
        for index, (name, run) in enumerate(runs.items()):
            if flush_each or index == 0:
                flush.sum()
            began = time.perf_counter()
            run()
            took = time.perf_counter() - began
            least[name] = min(took, least.get(name, took)) if turn > 1 else took
        if turn + 1 >= least_rounds and time.perf_counter() > ends:
            break
    return least


def faster(
    times: Mapping[str, Mapping[int, float]], one: str, other: str, clearly: float = 1.0
) -> Callable[[int], bool]:
    """Whether one candidate takes less time than another, by the number of rows: as for the next lower one that was
    measured.

    Args:
        clearly: the other one has to take less than this share of its time.
    """
    counts = sorted(times[one])
    wins = [clearly * times[one][count] < times[other][count] for count in counts]
    return lambda rows: wins[max(0, bisect.bisect_right(counts, rows) - 1)]


def kept_times(facts: Sequence[str], measure: Callable[[], CandidateTimes]) -> CandidateTimes:
    """Seconds by candidate and number of rows: what was measured earlier for these facts on this CPU, or is now."""
    name, key = _named(facts), "candidates"
    times = _stored(name).get(key)
    if times and all(each and all(each.values()) for each in times.values()):
        return times
    times = measure()
    _keep(name, {key: times})
    return times


def _place(products: Collection[Product]) -> str:
    """The name of the file for what is measured of these products."""
    return _named(sorted(map(str, products)))


def _named(facts: Sequence[str]) -> str:
    """The name of the file for what is measured: of this CPU, number of threads, torch, and some facts."""
    facts = [
        cpu_facts(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        torch.__version__,
        *facts,
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32] + ".json"


def cpu_facts() -> str:
    """The CPU's name and features, as Linux has them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model", "cpu family", "stepping", "flags")))


def _stored(name: str) -> Times:
    """What a file has of earlier measurements; nothing if it cannot be read."""
    try:
        return msgspec.json.decode((private_dir(cache_dir() / "tuning") / name).read_bytes(), type=Times)
    except (OSError, KeysError, msgspec.MsgspecError):
        return {}


def _read(name: str, products: Collection[Product]) -> Times | None:
    """What was measured earlier; None if nothing was, or what is there does not fit."""
    times = _stored(name)
    for product in products:
        layouts = times.get(str(product), {})
        if "plain" not in layouts or not layouts.keys() <= {"plain", "onednn"}:
            return None
        if any(each.keys() != set(ROWS) or not all(each.values()) for each in layouts.values()):
            return None
    return times


def _keep(name: str, times: Times) -> None:
    """Keeps what was measured; not where nothing can be written."""
    try:
        write_private(private_dir(cache_dir() / "tuning") / name, msgspec.json.encode(times))
    except KeysError as error:
        log.info("measurements are not kept: %s", error)
