"""Layers become fused (`fused_layers.py`) as soon as the code is compiled, if their output stays what it is."""

from __future__ import annotations

import logging

import torch

from split_common.engine import native
from split_common.engine.fused_layers import FusedLayers
from split_common.engine.fused_sketch import OtherShape
from split_common.engine.fused_times import when_faster
from split_common.engine.layers import LayerRange
from split_common.engine.packed import PackedExecutor
from split_common.engine.pool import LayerShape, PagePool
from split_common.engine.probe import rehearse

log = logging.getLogger(__name__)

#: Largest accepted error of fused output, relative to the largest output. Both add up fp32, in another order.
FUSED_TOLERANCE = 2e-5

#: Tokens of the sequences in each forward that is compared: prompts over several pages, one token, several.
STEPS = ((40, 21), (1, 1), (3, 1), (1, 1, 1, 20), (1,))

#: Pages for them.
PAGES = 16


class FusedWhenReady:
    """Layers of the usual shape whose code is being compiled (a `split_common.engine.packed.Fusing`).

    Args:
        layers: the range, with sketches of all its layers.
        packed: runs them, before they are fused.
    """

    def __init__(self, layers: LayerRange, packed: PackedExecutor) -> None:
        self._layers, self._packed = layers, packed
        keys = packed.store.layers
        self._shapes = {
            index: LayerShape(key.shape[1], key.shape[2], value.shape[2]) for index, (key, value) in keys.items()
        }
        self._expected = rehearse(layers, self._executor(), STEPS)

    @property
    def ready(self) -> bool:
        return native.library() is not None or native.failed()

    def fuse(self) -> FusedLayers | None:
        library = native.library()
        if library is None:
            return None
        try:
            fused = FusedLayers(
                library, self._layers, self._layers.tuning.sketches, self._packed.calls, self._shapes
            )
            executor = self._executor()
            executor.fused = fused
            output = rehearse(self._layers, executor, STEPS)
        except OtherShape as reason:
            log.info("layers are not fused: %s", reason)
            return None
        except Exception as error:
            log.warning("layers are not fused: %s: %s", type(error).__name__, error)
            return None
        differs = float((output - self._expected).abs().max() / self._expected.abs().max())
        if not differs < FUSED_TOLERANCE:
            log.info("layers are not fused: their output differs by %.1e", differs)
            return None
        fused.is_faster = when_faster(fused, self._layers, self._packed.backend, self._shapes)
        return fused

    def _executor(self) -> PackedExecutor:
        """One with a small pool of its own."""
        pool = PagePool(self._shapes, PAGES, torch.float32, self._packed.store.page_tokens)
        return PackedExecutor(self._layers, pool, self._packed.backend)


def fuse_when_ready(layers: LayerRange, packed: PackedExecutor) -> None:
    """Has layers fused as soon as that is possible, if there are sketches of all of them: at once, if it is now."""
    if not all(index in layers.tuning.sketches for index in layers.split.body):
        return
    packed.fusing = FusedWhenReady(layers, packed)
    if packed.fusing.ready:
        packed.fused, packed.fusing = packed.fusing.fuse(), None
