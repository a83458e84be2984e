"""Finds out how layers can be run: packed, if the output is that of one sequence at a time, which is always right.

Architectures are known only by a rehearsal: a few steps of two sequences over random states.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from split_common.compat.transformers import attention_implementation
from split_common.engine import attention, flash
from split_common.engine.attention import AttentionCall, Backend
from split_common.engine.attention_calls import HARMLESS
from split_common.engine.compiled import compile_layers, forget_compiled
from split_common.engine.division import append_next, append_parts
from split_common.engine.footprint import Footprint, measure_footprint
from split_common.engine.forward import Executor
from split_common.engine.layers import LayerRange
from split_common.engine.packed import PackedExecutor
from split_common.engine.per_sequence import CacheStore, PerSequenceExecutor
from split_common.engine.pool import LayerShape, PagePool, ProbePool
from split_common.engine.sdpa import SdpaAttention
from split_common.engine.sequences import TokenRun
from split_common.engine.tree_probe import takes_trees
from split_common.errors import ModelError, UnsupportedArchitecture
from split_common.models.cache_layers import counts_tokens, unpackable

log = logging.getLogger(__name__)

#: Largest accepted error of packed output, relative to the largest output of one sequence at a time.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

#: Largest accepted error of compiled layers in half precision, relative to the norm of all outputs.
COMPILED_TOLERANCE = 0.25

#: Difference of outputs, relative to their norm, above which they are not the same up to rounding.
MISTAKEN = 0.1

#: How many tokens each of the steps has in which a sequence is run in parts: prompts, decoding, several at once.
_PARTS = (2, 1, 2)

#: How many tokens the sequences have in each forward of a rehearsal. Batches with and without padding rows, of one
#: sequence and of several, take different ways through layers.
REHEARSAL = ((8, 5), (1, 1), (1, 4), (2, 2), (1, 1, 1, 1), (1,))

#: Pages in the pool of a rehearsal.
PROBE_PAGES = 8


class NotPackable(Exception):
    """The layers cannot be run packed. The message says why."""


def check_layers(layers: LayerRange, reference: PerSequenceExecutor) -> tuple[Footprint, torch.Tensor]:
    """Runs two sequences, each at once, in parts, and in parts that take turns; then rehearses.

    The latter two must agree, and also with the first one unless tokens see those after them.

    Returns:
        What a sequence takes of each device's memory, and the rehearsal's output `[tokens, width]`.

    Raises:
        UnsupportedArchitecture: the layers cannot run alone, or what they keep between steps is not what their
            cache has, such as states in their modules.
    """
    name = layers.stack.name
    states = torch.randn(2, sum(_PARTS), layers.width, generator=torch.Generator().manual_seed(0))
    whole = [reference.store.new_sequence() for _ in states]
    parts = [reference.store.new_sequence() for _ in states]
    try:
        at_once = [append_next(reference, *each, sum(_PARTS)) for each in zip(whole, states, strict=True)]
        alone = [append_parts(reference, each, _PARTS) for each in states]
        turns = [
            [append_next(reference, *each, count) for each in zip(parts, states, strict=True)] for count in _PARTS
        ]
        in_turns = [torch.cat(each) for each in zip(*turns, strict=True)]
        counting = [
            layer for sequence in (*whole, *parts) for layer in sequence.cache.layers if counts_tokens(layer)
        ]
        lengths = {layer.get_seq_length() for layer in counting}
    except Exception as error:
        raise UnsupportedArchitecture(f"{name} cannot run its layers alone: {error}") from None
    right = _close(in_turns, alone) and (_close(in_turns, at_once) or not _close(turns[0], _first_parts(at_once)))
    if lengths != {sum(_PARTS)} or not right:
        raise UnsupportedArchitecture(
            f"{name} computes something else if two sequences run in parts, in turns: it keeps more between steps "
            "than its cache has, or ignores what the cache has"
        )
    if reference.store.has_states and layers.stack.positions_interact:
        raise UnsupportedArchitecture(
            f"{name} has states, which are taken back by running tokens again, and rotary embeddings that depend "
            "on the last position"
        )
    kept = whole[0].cache.layers[layers.split.first : layers.split.last]
    footprint = measure_footprint(kept, layers.devices, whole[0].length)
    for sequence in (*whole, *parts):
        sequence.free()
    return footprint, rehearse(layers, reference)


def _first_parts(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [output[: _PARTS[0]] for output in outputs]


def _close(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether outputs are about what they should be, or the latter are not finite."""
    one, other = torch.cat([*outputs]).float(), torch.cat([*expected]).float()
    return bool((one - other).norm() <= MISTAKEN * other.norm()) or not bool(torch.isfinite(other).all())


def packed_executor(
    layers: LayerRange, reference: CacheStore, expected: torch.Tensor, kv_bytes: int
) -> PackedExecutor:
    """The executor of the fastest backend whose packed output is right.

    Args:
        layers: the layers, whose attention becomes the packed one unless NotPackable is raised.
        reference: shows which layers have a sliding window.
        expected: the rehearsal's output of one sequence at a time, `[tokens, width]`.
        kv_bytes: memory for keys and values.

    Raises:
        NotPackable: no backend's output is right.
        ModelError: the memory does not hold the pages that are needed.
    """
    if (kept := unpackable(reference.new_cache(), layers.split)) is not None:
        raise NotPackable(kept)
    original = attention_implementation(layers.owner)
    reason = NotPackable("no attention backend was tried")
    for backend in _backends(layers):
        try:
            shapes, calls = _check_packed(layers, backend, reference, expected)
        except NotPackable as error:
            log.info("sequences are not packed with %s: %s", backend.name, error)
            reason = error
        else:
            packed = PackedExecutor(layers, _make_pool(layers, backend, shapes, kv_bytes), backend, calls)
            rehearsing = PackedExecutor(layers, ProbePool(PROBE_PAGES, backend.page_tokens), backend)
            packed.takes_trees = takes_trees(rehearsing, layers.width, TOLERANCE[layers.dtype])
            return packed
    layers.owner.set_attn_implementation(original)
    raise reason


def compile_checked(layers: LayerRange, executor: PackedExecutor) -> bool:
    """Compiles the layers, unless that fails or changes their output too much. Returns whether they are compiled.

    Compiled kernels round less often, which changes a deep stack's output as much as half precision itself does.
    """
    expected = rehearse(layers, executor)
    compile_layers(layers.modules)
    try:
        output = rehearse(layers, executor)
        # The last token ran in a forward of its own, with other kernels than the rest.
        parts = (slice(-1), slice(-1, None))
        error = max(float((output[part] - expected[part]).norm() / expected[part].norm()) for part in parts)
        if error < COMPILED_TOLERANCE:
            return True
        reason = f"their output differs by {error:.1e}"
    except Exception as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
    log.warning("layers are not compiled: %s", reason)
    forget_compiled(layers.modules)
    return False


def _backends(layers: LayerRange) -> list[Backend]:
    """The backends to try, the fastest first."""
    fast: list[Backend] = [flash.FlashAttention()] if flash.usable(layers.device, layers.dtype) else []
    return [*fast, SdpaAttention()]


def _make_pool(layers: LayerRange, backend: Backend, shapes: dict[int, LayerShape], kv_bytes: int) -> PagePool:
    page_bytes = PagePool.bytes_per_token(shapes, layers.dtype) * backend.page_tokens
    pages = kv_bytes // page_bytes
    # A sequence needs a page, and graphs reserve a scratch page.
    least = 2 if backend.capturable else 1
    if pages < least:
        raise ModelError(
            f"{kv_bytes:,} bytes of KV memory hold {pages} pages of {backend.page_tokens} tokens: at least "
            f"{least * page_bytes:,} bytes are needed"
        )
    return PagePool(shapes, pages, layers.dtype, backend.page_tokens)


def rehearse(layers: LayerRange, executor: Executor, steps: Sequence[Sequence[int]] = REHEARSAL) -> torch.Tensor:
    """Prefills, decodes and rolls back sequences over fixed random states: float32 `[tokens, width]`.

    Args:
        layers: the layers.
        executor: runs them.
        steps: the tokens of each sequence, four at most, in each forward.
    """
    generator = torch.Generator().manual_seed(0)
    sequences = [executor.store.new_sequence() for _ in range(4)]
    outputs = []
    try:
        for counts in steps:
            runs = [
                TokenRun(
                    sequence,
                    torch.randn(count, layers.width, generator=generator),
                    range(sequence.length, sequence.length + count),
                )
                for sequence, count in zip(sequences, counts, strict=False)
            ]
            outputs += executor.launch(runs).wait()
            sequences[1].truncate(sequences[1].length - 1)
    finally:
        for sequence in sequences:
            sequence.free()
    return torch.cat(outputs).float()


def _check_packed(
    layers: LayerRange, backend: Backend, reference: CacheStore, expected: torch.Tensor
) -> tuple[dict[int, LayerShape], dict[int, AttentionCall]]:
    """Each layer's shape of keys and values, and what it passes to its attention. Raises NotPackable."""
    pool = ProbePool(PROBE_PAGES, backend.page_tokens)
    calls: list[tuple[AttentionCall, list[str]]] = []
    token = attention.recording.set(calls)
    try:
        layers.owner.set_attn_implementation(attention.ATTENTION_NAME)
        output = rehearse(layers, PackedExecutor(layers, pool, backend))
    except Exception as error:
        raise NotPackable(f"their attention fails: {type(error).__name__}: {error}") from error
    finally:
        attention.recording.reset(token)
    _check_calls(layers, reference, calls)
    differs = ((output - expected).abs().max() / expected.abs().max()).item()
    if not differs < TOLERANCE[layers.dtype]:
        raise NotPackable(f"their packed output differs by {differs:.1e}")
    return pool.shapes, {call.layer: call for call, _ in calls}


def _check_calls(layers: LayerRange, reference: CacheStore, calls: list[tuple[AttentionCall, list[str]]]) -> None:
    """Raises NotPackable if layers ask their attention for something that it does not support."""
    cache = reference.new_cache()
    called = [call.layer for call, _ in calls]
    if not called or called != list(layers.split.body) * (len(called) // len(layers.split.body)):
        raise NotPackable("they do not call a registered attention once in each layer")
    for call, others in calls:
        unknown = sorted(set(others) - HARMLESS)
        if unknown:
            raise NotPackable(f"layer {call.layer} hands its attention {', '.join(unknown)}")
        layer = cache.layers[call.layer]
        window = int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None
        if call.window != window:
            raise NotPackable(f"layer {call.layer} has a window of {window}, its attention one of {call.window}")
