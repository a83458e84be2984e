"""For how many tokens fused layers take less time than the layers' own code: measured, on one layer."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from split_common.engine import attention, native
from split_common.engine.attention import Backend, PackedBatch, Span
from split_common.engine.fused_layers import FusedLayers
from split_common.engine.layers import LayerRange
from split_common.engine.mixed import plan_batch
from split_common.engine.pool import LayerShape, PagePool
from split_common.engine.tuning import CandidateTimes, faster, in_turns, kept_times

log = logging.getLogger(__name__)

#: Numbers of tokens that are measured. More are like the last.
TOKENS = (1, 2, 4, 16, 64, 256)

#: The share of the fused layer's time that its own code has to stay below. What is timed attends to few keys; to
#: many, fused layers gain more.
CLEARLY = 0.7


def when_faster(
    fused: FusedLayers, layers: LayerRange, backend: Backend, shapes: dict[int, LayerShape]
) -> Callable[[int], bool]:
    """Whether fused layers take less time, by the number of tokens. If that cannot be measured, they do."""
    index = layers.split.first
    slot = layers.stack.slots[index]
    sizes = [str(tuple(parameter.shape)) for parameter in slot.parameters()]

    def measure() -> CandidateTimes:
        pages = sum(-(-count // backend.page_tokens) for count in TOKENS)
        pool = PagePool(shapes, 2 * pages, torch.float32, backend.page_tokens)
        batches = {count: _batch(pool, count, layers.width) for count in TOKENS}

        def in_one_call(count: int) -> Callable[[], object]:
            spans, slots, states, positions = batches[count]
            return lambda: fused.run(pool, spans, states, positions, slots, first=True)

        def by_layer(count: int) -> Callable[[], object]:
            spans, slots, states, positions = batches[count]
            batch = PackedBatch(pool, [count], slots, plan_batch(backend, pool, spans, layers.device))
            given = layers.stack.arguments_of(positions)[index]

            def run() -> None:
                token = attention.current.set(batch)
                try:
                    # Without the hooks, which replace its input.
                    slot.forward(states[None], **given)
                finally:
                    attention.current.reset(token)

            return run

        return in_turns({"fused": in_one_call, "plain": by_layer}, TOKENS)

    try:
        with torch.inference_mode():
            times = kept_times(["fused layers", native.code_name(), *sizes], measure)
    except Exception as error:
        log.info("fused layers are not timed: %s: %s", type(error).__name__, error)
        return lambda _tokens: True
    return faster(times, "fused", "plain", CLEARLY)


def _batch(pool: PagePool, count: int, width: int) -> tuple[list[Span], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first tokens of a sequence: its span, slots, states and positions."""
    sequence = pool.new_sequence()
    slots = torch.from_numpy(sequence.append(count))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")
    return [Span(sequence, 0, count)], slots, states, torch.arange(count, device="cpu")[None]
