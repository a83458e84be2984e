"""The runner: one forward of transformers' own layers over the tokens of many rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache

from split_common.compat.transformers import attention_implementation
from split_common.engine import attention, flash
from split_common.engine.attention import Backend, Call, PackedBatch, Span
from split_common.engine.compiled import compile_layers, forget_compiled
from split_common.engine.graphs import DecodeGraphs, new_capture
from split_common.engine.linear import padded_rows
from split_common.engine.pool import LayerShape, PagedSequence, PagePool, ProbePool
from split_common.engine.rotary import isolate_rotary
from split_common.engine.rows import Row, Run, Store
from split_common.engine.sdpa import SdpaAttention
from split_common.engine.separate import CacheRow, SeparateStore
from split_common.errors import ModelError, UnsupportedArchitecture
from split_common.slots import Stack
from split_common.split import Split

log = logging.getLogger(__name__)

#: Largest error of the packed path that the probe accepts, relative to the largest output of one row at a time.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

#: The same of compiled layers, in half precision and relative to the norm of all outputs.
COMPILED_TOLERANCE = 0.25

#: Keyword arguments of attention that need nothing of the packed path.
_HARMLESS = {"position_ids", "use_cache", "cache", "past_key_values", "cache_position", "is_causal", "training"}


class Launched:
    """A forward that was started: on CUDA it runs, and its output travels, while the host does something else.

    Args:
        output: of all runs, `[tokens, width]`, on the device.
        counts: tokens of each run in the output.
        order: which run each of them is.
    """

    def __init__(self, output: torch.Tensor, counts: Sequence[int], order: Sequence[int]) -> None:
        self._counts, self._order = counts, order
        self._arrived: torch.cuda.Event | None = None
        self._host = output
        if output.is_cuda:
            self._host = torch.empty_like(output, device="cpu", pin_memory=True)
            self._host.copy_(output, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(output.device))

    def wait(self) -> list[torch.Tensor]:
        """The layers' output for each run, `[tokens, width]`, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        parts = torch.split(self._host, list(self._counts))
        return [part for _, part in sorted(zip(self._order, parts, strict=True), key=lambda pair: pair[0])]


class Runner:
    """Runs the layers `[split.first, split.last)` of a model. Not thread-safe: one thread computes.

    Args:
        stack: a loaded model's slots; those outside the range pass their input through.
        split: the range.
        config: the model's text configuration.
        kv_bytes: memory for keys and values.

    Raises:
        ModelError: the memory holds not even one page of tokens.
        UnsupportedArchitecture: the layers keep more than keys and values from one step to the next.
    """

    def __init__(self, stack: Stack, split: Split, config: Any, kv_bytes: int) -> None:
        self._stack = stack
        self._split = split
        self._owner: Any = stack.owner
        parameter = next(self._owner.parameters())
        #: Where the first layer is, and what they all compute in.
        self.device, self.dtype = parameter.device, parameter.dtype
        #: Whether a forward that was launched runs while the host does something else.
        self.asynchronous = self.device.type == "cuda"
        #: Width of the hidden states.
        self.width = int(config.hidden_size)
        #: Positions that a row may have.
        self.max_positions = stack.max_positions
        self._incoming: torch.Tensor | None = None
        self._outgoing: torch.Tensor | None = None
        stack.slots[split.first].register_forward_pre_hook(self._inject)
        stack.slots[split.last - 1].register_forward_hook(self._capture)
        isolate_rotary(self._owner)
        #: Whether a token's rotary embedding depends on the positions after it in the same forward.
        self.positions_interact = stack.positions_interact
        #: Why rows are run one at a time; None if they are packed.
        self.separate_because: str | None = None
        #: How packed rows are attended to.
        self.backend: Backend = SdpaAttention()
        self._graphs: DecodeGraphs | None = None
        #: Whether the layers are compiled.
        self.compiled = False
        #: Makes rows, and knows how much room is left.
        self.store: Store
        self.store = self._choose_store(config, kv_bytes)
        if isinstance(self.backend, flash.FlashAttention) and not (self.positions_interact or self._spread):
            assert isinstance(self.store, PagePool)
            self._compile()
            self._graphs = DecodeGraphs(self._forward_packed, self.store, self.width, self.dtype, new_capture)

    @property
    def _spread(self) -> bool:
        """Whether layers are on another GPU than the first, on which graphs are captured."""
        return any(parameter.device.index for parameter in self._owner.parameters())

    def run(self, runs: Sequence[Run]) -> list[torch.Tensor]:
        """Appends tokens to rows; the caller has seen that there is room in the store.

        Returns:
            The layers' output for each run, `[tokens, width]`, on the host.
        """
        return self.launch(runs).wait()

    def launch(self, runs: Sequence[Run]) -> Launched:
        """Starts a forward that appends tokens to rows; later forwards see what earlier ones wrote."""
        with torch.inference_mode():
            if self.separate_because is None:
                return self._launch_packed(runs)
            output = torch.cat([self._run_separate(run) for run in runs])
            return Launched(output, [len(run.positions) for run in runs], range(len(runs)))

    def _compile(self) -> None:
        """Has the layers compiled where that works.

        Compiled kernels round less often, which changes a deep stack's output as much as half precision does
        anyway.
        """
        layers = list(self._stack.slots[self._split.first : self._split.last])
        wanted, _ = self._rehearse()
        compile_layers(layers)
        try:
            got, _ = self._rehearse()
            # The last token was computed by itself, by other kernels than the rest.
            parts = (slice(-1), slice(-1, None))
            differs = max(float((got[part] - wanted[part]).norm() / wanted[part].norm()) for part in parts)
            self.compiled = differs < COMPILED_TOLERANCE
            reason = f"their output differs by {differs:.1e}"
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if not self.compiled:
            log.warning("layers are not compiled: %s", reason)
            forget_compiled(layers)

    # --- one forward ---------------------------------------------------------------------------------------

    def _launch_packed(self, runs: Sequence[Run]) -> Launched:
        # Decoding rows come first, so that attention can take them together.
        order = sorted(range(len(runs)), key=lambda index: len(runs[index].positions) > 1)
        spans, slots, begin = [], [], 0
        for run in (runs[index] for index in order):
            sequence = cast(PagedSequence, run.row)
            slots.append(sequence.append(len(run.positions)))
            spans.append(Span(sequence, begin, len(run.positions)))
            begin += len(run.positions)
        counts = [span.count for span in spans]
        states = torch.cat([runs[index].states for index in order])
        positions = torch.tensor([[position for index in order for position in runs[index].positions]])
        tokens = len(states)
        packed_slots = torch.from_numpy(np.concatenate(slots))
        if self._graphs is not None and len(runs) == tokens:
            output = self._graphs.run(spans, states, positions, packed_slots)
            if output is not None:
                return Launched(output, counts, order)
        pool = spans[0].sequence.pool
        plan = self.backend.plan(pool, spans, self.device)
        packed = counts
        if self.device.type == "cpu" and (padding := padded_rows(tokens) - tokens):
            states, positions = pad(states, (0, 0, 0, padding)), pad(positions, (0, padding))
            packed = [*counts, padding]
        batch = PackedBatch(pool, packed, self._moved(packed_slots), plan)
        output = self._forward_packed(self._moved(states), self._moved(positions), batch)
        return Launched(output[:tokens], counts, order)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on the first layer's device; the host does not wait for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.asynchronous else tensor

    def _forward_packed(self, states: torch.Tensor, positions: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        token = attention.current.set(batch)
        try:
            return self._forward(states, positions, {"use_cache": False})
        finally:
            attention.current.reset(token)

    def _run_separate(self, run: Run) -> torch.Tensor:
        row = cast(CacheRow, run.row)
        states, positions = self._moved(run.states), self._moved(torch.tensor([list(run.positions)]))
        output = self._forward(states, positions, {self._stack.cache_name: row.cache, "use_cache": True})
        row.extended(len(run.positions))
        return output

    def _forward(self, states: torch.Tensor, positions: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Runs the layers over states `[tokens, width]` at positions `[1, tokens]`, on the first layer's device."""
        self._incoming = states[None].to(self.dtype)
        if self._stack.takes_positions:
            arguments["position_ids"] = positions
        # The embeddings are on the other side: what the first layer sees is put in its place.
        self._owner(inputs_embeds=torch.zeros_like(self._incoming), **arguments)
        output, self._incoming, self._outgoing = self._outgoing, None, None
        assert output is not None
        return output[0]

    def _inject(self, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._incoming, *args[1:])

    def _capture(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self._outgoing = output[0] if isinstance(output, tuple) else output

    # --- can it be packed? ---------------------------------------------------------------------------------

    def _choose_store(self, config: Any, kv_bytes: int) -> Store:
        """Packed rows if the layers give the same output that way, else one at a time."""
        separate = SeparateStore(config, self._split, 2**31)
        self.store, self.separate_because = separate, ""
        wanted, token_bytes = self._check_separate()
        original = attention_implementation(self._owner)
        for backend in self._backends():
            try:
                shapes = self._check_packed(backend, wanted, separate.new_cache())
                break
            except _NotPackable as reason:
                log.info("rows are not packed with %s: %s", backend.name, reason)
                self.separate_because = str(reason)
        else:
            self._owner.set_attn_implementation(original)
            self.store = separate
            separate.capacity = kv_bytes // token_bytes
            return separate
        pages = kv_bytes // (PagePool.bytes_per_token(shapes, self.dtype) * backend.page_tokens)
        # Beside graphs' blank page there must be one for a row.
        least = 2 if isinstance(backend, flash.FlashAttention) else 1
        if pages < least:
            raise ModelError(
                f"{kv_bytes:,} bytes of KV memory hold {pages} pages of {backend.page_tokens} tokens: at least "
                f"{least} are needed"
            )
        return PagePool(shapes, pages, self.dtype, backend.page_tokens)

    def _backends(self) -> list[Backend]:
        """Those to try, the fastest first."""
        fast: list[Backend] = [flash.FlashAttention()] if flash.usable(self.device, self.dtype) else []
        return [*fast, SdpaAttention()]

    def _check_separate(self) -> tuple[torch.Tensor, int]:
        """Runs three tokens at once and in two steps, which must agree; then rehearses."""
        states = torch.randn(3, self.width, generator=torch.Generator().manual_seed(0))
        whole, parts = self.store.new_row(), self.store.new_row()
        try:
            (expected,) = self.run([Run(whole, states, [0, 1, 2])])
            output = torch.cat(self.run([Run(parts, states[:2], [0, 1])]) + self.run([Run(parts, states[2:], [2])]))
            lengths = {
                layer.get_seq_length() for row in (whole, parts) for layer in cast(CacheRow, row).cache.layers
            }
        except Exception as error:
            raise UnsupportedArchitecture(f"{self._stack.name} cannot run its layers alone: {error}") from None
        close = (output - expected).norm() <= 0.1 * expected.norm() or not torch.isfinite(expected).all()
        if lengths != {3} or not close:
            raise UnsupportedArchitecture(f"{self._stack.name} keeps more than keys and values between steps")
        whole.free()
        parts.free()
        return self._rehearse()

    def _rehearse(self) -> tuple[torch.Tensor, int]:
        """Runs two rows in turns over fixed random states: their outputs, and the bytes that a token takes."""
        generator = torch.Generator().manual_seed(0)
        rows = [self.store.new_row(), self.store.new_row()]
        outputs = []
        try:
            for counts in ((9, 5), (1, 1), (1, 4), (1,)):
                runs = [
                    Run(
                        row,
                        torch.randn(count, self.width, generator=generator),
                        range(row.length, row.length + count),
                    )
                    for row, count in zip(rows, counts, strict=False)
                ]
                outputs += self.run(runs)
                rows[1].truncate(rows[1].length - 1)
            states = torch.cat(outputs).float()
            token_bytes = _cache_bytes(rows[0]) // rows[0].length
        finally:
            for row in rows:
                row.free()
        return states, token_bytes

    def _check_packed(self, backend: Backend, wanted: torch.Tensor, cache: DynamicCache) -> dict[int, LayerShape]:
        """Raises _NotPackable, saying why, unless the packed path does what the layers' own attention does."""
        pool = ProbePool(8, backend.page_tokens)
        self.store, self.separate_because, self.backend = pool, None, backend
        calls: list[tuple[Call, list[str]]] = []
        token = attention.watching.set(calls)
        try:
            self._owner.set_attn_implementation(attention.NAME)
            got, _ = self._rehearse()
        except Exception as error:
            raise _NotPackable(f"their attention fails: {type(error).__name__}: {error}") from error
        finally:
            attention.watching.reset(token)
        layers = [call.layer for call, _ in calls]
        if layers != list(self._split.body) * (len(layers) // len(self._split.body)) or not layers:
            raise _NotPackable("they do not call a registered attention once in each layer")
        for call, others in calls:
            unknown = sorted(set(others) - _HARMLESS)
            if unknown:
                raise _NotPackable(f"layer {call.layer} hands its attention {', '.join(unknown)}")
            layer = cache.layers[call.layer]
            window = int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None
            if call.window != window:
                raise _NotPackable(
                    f"layer {call.layer} has a window of {window}, its attention one of {call.window}"
                )
        differs = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if not differs < TOLERANCE[self.dtype]:
            raise _NotPackable(f"their packed output differs by {differs:.1e}")
        return pool.shapes


class _NotPackable(Exception):
    """The layers cannot be run packed; the message says why."""


def _cache_bytes(row: Row) -> int:
    """What a row's own cache takes; 1 for a paged row, whose pool knows."""
    if not isinstance(row, CacheRow):
        return 1
    layers = {id(layer): layer for layer in row.cache.layers}.values()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
