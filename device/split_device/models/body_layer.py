"""The cache layer that stands in for a layer of the body in transformers' own cache."""

from __future__ import annotations

from typing import Any, Protocol

from transformers.cache_utils import DynamicLayer

from split_common.errors import UnsupportedFeature


class HasLength(Protocol):
    """The layer that has the session."""

    def get_seq_length(self) -> int:
        """Columns of the cache, padding included."""


class BodyLayer(DynamicLayer):  # type: ignore[misc]
    """The cache layer of a slot of the body. It reports the length of the unsplit model's layer, but is empty.

    Args:
        holder: the layer that has the session; None if it is this one.
        window: the sliding window's size in tokens; None without one.
    """

    def __init__(self, holder: HasLength | None, window: int | None) -> None:
        super().__init__()
        self.is_initialized = True
        self.is_sliding = window is not None
        self._window = window
        self._holder = holder

    @property
    def keys(self) -> Any:
        """Refused, as are the values: they are on the worker."""
        raise UnsupportedFeature("keys and values of the body's layers are not here: they are on the worker")

    @keys.setter
    def keys(self, _nothing: None) -> None:
        """transformers' constructor sets None."""

    values = keys

    def get_seq_length(self) -> int:
        return self._holder.get_seq_length() if self._holder is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.get_seq_length()
        hidden = 0 if self._window is None else max(0, length - self._window + 1)
        return length - hidden + query_length, hidden

    def get_max_length(self) -> int:
        return -1 if self._window is None else self._window

    get_max_cache_shape = get_max_length

    def update(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UnsupportedFeature("the body's keys and values are on the worker")

    def offload(self) -> None:
        raise UnsupportedFeature(
            "an offloaded cache does not run split: the body's keys and values are on the worker"
        )

    def _nothing_here(self, *_args: Any) -> None:
        """Does nothing: the layer that has the session does it for the whole body."""

    reset = crop = reorder_cache = batch_select_indices = batch_repeat_interleave = _nothing_here
