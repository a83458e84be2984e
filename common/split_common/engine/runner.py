"""The runner: runs transformers' own layers over new tokens of many sequences."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from split_common.engine.division import is_indivisible
from split_common.engine.footprint import Footprint
from split_common.engine.forward import Executor, Forward
from split_common.engine.fusing import fuse_when_ready
from split_common.engine.layers import LayerRange
from split_common.engine.padding import padding_matters, probe_tokens
from split_common.engine.per_sequence import CacheStore, PerSequenceExecutor
from split_common.engine.probe import NotPackable, check_layers, compile_checked, packed_executor
from split_common.engine.sequences import TokenRun
from split_common.engine.tuning import UNMEASURED, Tuning
from split_common.errors import ModelError, UnsupportedArchitecture
from split_common.models.layer_stack import LayerStack
from split_common.models.split import Split


class Runner:
    """Runs a range of layers. Not thread-safe: one thread computes. Made by `build_runner`.

    Args:
        layers: the range.
        executor: runs them.
        compiled: whether they were compiled.
        unpacked_because: why sequences are run one at a time; None if they are packed.
        padding_matters: whether the unsplit layers compute a row differently if it has padding to its left.
        indivisible: whether the layers compute a prompt differently if it goes through in parts.
    """

    def __init__(
        self,
        layers: LayerRange,
        executor: Executor,
        *,
        compiled: bool = False,
        unpacked_because: str | None = None,
        padding_matters: bool = False,
        indivisible: bool = False,
    ) -> None:
        self.layers = layers
        self.executor = executor
        self.compiled = compiled
        self.unpacked_because = unpacked_because
        self.padding_matters = padding_matters
        self.indivisible = indivisible
        #: The device of the first layer, and the dtype that all layers compute in.
        self.device, self.dtype = layers.device, layers.dtype
        #: Whether a forward that was launched runs while the host does other work.
        self.asynchronous = layers.asynchronous
        #: Width of the hidden states.
        self.width = layers.width
        #: How many positions a sequence may have.
        self.max_positions = layers.stack.max_positions
        #: Whether a token's rotary embedding depends on the positions after it in the same forward.
        self.positions_interact = layers.stack.positions_interact
        #: Whether a step may go into several forwards.
        self.divisible = not (indivisible or self.positions_interact)
        #: Whether it takes runs with parents, and drops tokens before others of a sequence.
        self.takes_trees = self.divisible and executor.takes_trees
        #: The sequences' memory.
        self.store = executor.store

    def run(self, runs: Sequence[TokenRun[Any]]) -> list[torch.Tensor]:
        """Launches a forward and waits for it.

        Returns:
            The layers' output for each run, `[tokens, width]`, on the host.
        """
        return self.launch(runs).wait()

    def launch(self, runs: Sequence[TokenRun[Any]]) -> Forward:
        """Starts a forward that appends tokens to sequences, for which the store must have memory.

        Later forwards see what earlier ones wrote. If this fails, the sequences are truncated to their former
        lengths; what runs say of tokens that stay is done.
        """
        for run in runs:
            run.settle()
        lengths = [run.sequence.length for run in runs]
        try:
            return self.executor.launch(runs)
        except torch.AcceleratorError:
            # The GPU takes no more work from this process.
            raise
        except Exception:
            for run, length in zip(runs, lengths, strict=True):
                if run.sequence.length > length:
                    run.sequence.truncate(length)
            raise


def _total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, free or not."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else int(psutil.virtual_memory().total)


def _check_room(kv_bytes: int, layers: LayerRange, footprint: Footprint) -> None:
    """Raises ModelError if a device does not have so much memory as its layers' keys, values and states take."""
    several = len(set(layers.devices)) > 1
    for device in dict.fromkeys(layers.devices):
        needed = int(kv_bytes * footprint.share(device)) if several else kv_bytes
        if needed > (room := _total_memory(device)):
            raise ModelError(
                f"{needed:,} of {kv_bytes:,} bytes of KV memory would be on {device}, which has {room:,}: give a "
                "smaller --kv-memory"
                if several
                else f"{kv_bytes:,} bytes of KV memory are more than the {room:,} that there are: give a smaller "
                "--kv-memory"
            )


def build_runner(
    stack: LayerStack,
    split: Split,
    config: Any,
    kv_bytes: int | Mapping[torch.device, int],
    tuning: Tuning = UNMEASURED,
) -> Runner:
    """Makes the runner of some layers, after trial runs that show how they can be run.

    Args:
        stack: the slots of a loaded model; those outside the range pass their input through.
        split: the range.
        config: the model's text configuration.
        kv_bytes: memory for keys, values and states: on all devices of the layers together, or at most so much on
            each.
        tuning: of the layers on the CPU, made by `pack_linears`.

    Raises:
        ModelError: the memory does not hold the pages, or the states, that are needed at least, or is not there.
        UnsupportedArchitecture: the layers cannot run alone, or what they keep between steps is not
            what their cache has.
    """
    layers = LayerRange(stack, split, int(config.hidden_size), tuning)
    reference = PerSequenceExecutor(layers, CacheStore(config, split))
    footprint, expected = check_layers(layers, reference)
    if not isinstance(kv_bytes, int):
        kv_bytes = footprint.total(kv_bytes)
    _check_room(kv_bytes, layers, footprint)
    tokens = probe_tokens(layers, reference.store)
    matters = padding_matters(layers, reference.store, tokens)
    # Where positions interact, devices hand on what each part needs.
    indivisible = not stack.positions_interact and is_indivisible(layers, reference, tokens)
    if indivisible and reference.store.has_states:
        raise UnsupportedArchitecture(
            f"{stack.name} has states, which are taken back by running tokens again, and gives a "
            "different result for a prompt in parts"
        )
    build = functools.partial(Runner, layers, padding_matters=matters, indivisible=indivisible)
    try:
        packed = packed_executor(layers, reference.store, expected, kv_bytes)
    except NotPackable as reason:
        reference.store.measured(kv_bytes, footprint.token_bytes, footprint.state_bytes)
        if reference.store.capacity <= reference.store.sequence_tokens:
            raise ModelError(
                f"{kv_bytes:,} bytes of KV memory do not hold a sequence: its states alone take "
                f"{2 * footprint.state_bytes:,}"
            ) from None
        return build(reference, unpacked_because=str(reason))
    if not packed.capturable:
        fuse_when_ready(layers, packed)
        return build(packed)
    compiled = compile_checked(layers, packed)
    packed.capture_graphs()
    return build(packed, compiled=compiled)
