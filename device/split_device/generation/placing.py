"""Prompts with images for the generator: embedded once, with the places of their tokens.

The model's own `generate` runs for two tokens on a copy of the model without layers. So it says what it would hand
them: hidden states in which images are merged, positions, masks, and features that are added between layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from split_common.engine.lora import AdapterNumber, adapting
from split_common.engine.sequences import TokenRun
from split_common.errors import ConfigError, UnsupportedFeature
from split_common.models.cache_layers import has_states
from split_device.generation.request import Request
from split_device.models.additions import check_additions
from split_device.models.body_layer import BodyLayer
from split_device.models.language import SplitModelForCausalLM, SplitParts
from split_device.models.masks import plain_mask
from split_device.models.prepared import StepContext
from split_device.models.shared import shared_copy
from split_device.sessions.places import distinct_axes, spans_of


@dataclass(frozen=True)
class Placement:
    """Where the tokens of a prompt are, and those after it."""

    #: Int64 `[axes, tokens]`; the axes may agree.
    positions: torch.Tensor
    #: How many of the tokens after it each token attends to, int64 `[tokens]`.
    ahead: torch.Tensor
    #: The position of a token after the prompt, on all axes, minus its index.
    delta: int
    #: What is added to the output of the head's layers, `[tokens, width]`, by the layer's index.
    additions: Mapping[int, torch.Tensor]

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self.positions.shape[1]

    def positions_of(self, begin: int, count: int) -> torch.Tensor:
        """The positions of tokens from index `begin` on, int64 `[axes, count]`."""
        later = torch.arange(max(begin, self.tokens), max(begin + count, self.tokens)) + self.delta
        return torch.cat([self.positions[:, begin : begin + count], later.expand(len(self.positions), -1)], 1)

    def ahead_of(self, begin: int, count: int) -> torch.Tensor:
        """How many tokens after it each token from index `begin` on attends to, int64 `[count]`."""
        own = self.ahead[begin : begin + count]
        return torch.cat([own, own.new_zeros(count - len(own))])

    def run(self, run: TokenRun[Any], layers: range) -> TokenRun[Any]:
        """A run of the head or the tail, which has these layers, put in place. Its positions are indices."""
        begin, count = run.positions[0], run.cost
        first, *further = self.positions_of(begin, count).tolist()
        if all(axis == first for axis in further):
            further = []
        additions = {}
        if begin < self.tokens:
            later = (0, 0, 0, max(0, begin + count - self.tokens))
            additions = {
                layer: pad(features[begin : begin + count], later)
                for layer, features in self.additions.items()
                if layer in layers
            }
        return TokenRun(
            run.sequence,
            run.states,
            first,
            run.adapter,
            further,
            spans_of(self.ahead_of(begin, count).tolist()),
            additions,
        )

    def context(self, begin: int, count: int) -> StepContext:
        """What a session has to know of the tokens from index `begin` on."""
        positions, ahead = self.positions_of(begin, count), self.ahead_of(begin, count)[None]
        return StepContext(
            positions=positions[:, None] if len(positions) > 1 else positions,
            ahead=ahead if bool(ahead.any()) else None,
        )


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt's tokens: the first layer's input `[tokens, width]` on the CPU, and their places."""

    states: torch.Tensor
    placement: Placement


@dataclass
class _Call:
    """A call of the layers' owner: its arguments by name, and what it hands the first layer."""

    given: dict[str, Any]
    mask: tuple[torch.Tensor | None, torch.Tensor | None]
    states: torch.Tensor | None = None


@dataclass
class _Held:
    """Counts the tokens that a cache without keys would hold."""

    tokens: int = 0

    def get_seq_length(self) -> int:
        return self.tokens


@dataclass
class ImagePrompts:
    """Embeds prompts with images, one after the other on a thread of its own.

    Args:
        model: a model made by `from_pretrained`, of any kind.
        packed: whether head and tail run many sequences in one forward.
    """

    model: Any
    packed: bool
    _owner_arguments: Sequence[str] = ()
    _calls: list[_Call] = field(default_factory=list)
    _held: _Held = field(default_factory=_Held)

    def __post_init__(self) -> None:
        self._parts: SplitParts = self.model.split_parts
        self._takes_images = self._parts.traits.axes is not None
        self._thread = ThreadPoolExecutor(1, "lambda-split-images")
        if not self._takes_images:
            return
        self._copy, self._stack = shared_copy(self.model, range(0))
        self._copy.generation_config = GenerationConfig()
        copied: SplitModelForCausalLM = self._copy
        #: transformers' own, without what a split model refuses.
        self._own_generate = super(SplitModelForCausalLM, copied).generate
        owner = self._stack.owner
        _, *self._owner_arguments = inspect.signature(inspect.unwrap(type(owner).forward)).parameters
        owner.register_forward_pre_hook(self._before_stack, with_kwargs=True)
        self._stack.slots[0].register_forward_pre_hook(self._at_first_slot)

    def check(self) -> None:
        """Raises ConfigError if the model takes no images."""
        if not self._takes_images:
            raise ConfigError(f"{self.model.name_or_path} takes no images: it is a model for texts")

    def start(
        self,
        request: Request,
        adapter: AdapterNumber,
        done: Callable[[PlacedPrompt | Exception], None],
    ) -> None:
        """Begins to `place` a request's prompt. `done` gets the outcome, on the thread of prompts with images."""

        def place() -> None:
            outcome: PlacedPrompt | Exception
            try:
                outcome = self.place(request.prompt, request.images, adapter)
            except Exception as error:
                outcome = error
            done(outcome)

        self._thread.submit(place)

    def close(self) -> None:
        """Waits for the prompt under way, and drops all others."""
        self._thread.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def place(
        self, prompt: Sequence[int], images: Mapping[str, torch.Tensor], adapter: AdapterNumber
    ) -> PlacedPrompt:
        """Embeds a prompt.

        Args:
            prompt: token ids, those that stand for images included.
            images: further arguments of `generate`, of one row, as a processor makes them.
            adapter: number of the adapter; None for none.

        Raises:
            ConfigError: the model refuses the images.
            UnsupportedFeature: the generator cannot do what the model does with them.
        """
        ids = torch.tensor([list(prompt)], device=self.model.device)
        given = {
            name: tensor.to(self.model.device, self.model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in images.items()
        }
        try:
            prefill, decoding = self._two_calls(ids, given, adapter)
        except UnsupportedFeature:
            raise
        # The model's own code, with errors of its own for images that do not fit the prompt.
        except Exception as error:
            raise ConfigError(f"the model refuses these images: {error}") from None
        assert prefill.states is not None
        positions = self._axes(prefill, len(prompt), 0)
        (_, ahead), states = prefill.mask, prefill.states[0].cpu()
        placement = Placement(
            positions,
            torch.zeros(len(prompt), dtype=torch.long) if ahead is None else ahead[0].cpu(),
            self._delta(decoding, len(prompt)),
            self._additions(prefill.given),
        )
        if bool(placement.ahead.any()) and not self.packed:
            raise UnsupportedFeature(
                "images whose tokens attend both ways are not batched with other requests if the device's layers "
                "run one sequence at a time: use generate from Python"
            )
        return PlacedPrompt(states, placement)

    def _two_calls(
        self, ids: torch.Tensor, images: Mapping[str, torch.Tensor], adapter: AdapterNumber
    ) -> tuple[_Call, _Call]:
        """The calls of the layers' owner for a prompt, and for a token after it."""
        self._calls, self._held = [], _Held()
        with adapting([adapter], [1]):
            self._own_generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=2,
                do_sample=False,
                eos_token_id=len(self.model.get_input_embeddings().weight),
                logits_processor=LogitsProcessorList([_Repeating()]),
                **{self._stack.cache_name: self._cache()},
                **images,
            )
        prefill, decoding = self._calls
        self._calls = []
        return prefill, decoding

    def _cache(self) -> DynamicCache:
        """A cache that counts tokens, and has neither keys nor values."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        holder: Any = self._held
        layers = cache.layers or [None] * self._parts.split.layers
        cache.layers = [
            layer if layer is not None and has_states(layer) else BodyLayer(holder, _window(layer))
            for layer in layers
        ]
        return cache

    def _axes(self, call: _Call, tokens: int, begin: int) -> torch.Tensor:
        """The positions of a call's tokens, int64 `[axes, tokens]` on the CPU."""
        positions = call.given.get("position_ids")
        if positions is None:
            return torch.arange(begin, begin + tokens)[None]
        found = distinct_axes(positions.cpu(), self._parts.traits.axes or 1)
        return found[:, 0] if found.ndim == 3 else found[:1]

    def _delta(self, call: _Call, tokens: int) -> int:
        """How far the position of the token after the prompt is from its index. Raises UnsupportedFeature."""
        positions = {*self._axes(call, 1, tokens).flatten().tolist()}
        if len(positions) > 1:
            raise UnsupportedFeature(
                "images after which tokens have positions that differ by axis are not batched with other requests: "
                "use generate from Python"
            )
        return int(positions.pop()) - tokens

    def _additions(self, given: dict[str, Any]) -> dict[int, torch.Tensor]:
        """What is added in the head. Raises UnsupportedFeature if the generator cannot do it."""
        split = self._parts.split
        found = check_additions(self._stack, split, given)
        if any(index >= split.first for index in found):
            raise UnsupportedFeature(
                "images whose features are added in the tail are not batched with other requests: use generate "
                "from Python"
            )
        if found and not self.packed:
            raise UnsupportedFeature(
                "images whose features are added between layers are not batched with other requests if the "
                "device's layers run one sequence at a time: use generate from Python"
            )
        return {index: features[0].cpu() for index, features in found.items()}

    # --- hooks of the copy ---------------------------------------------------------------------------------

    def _before_stack(self, _owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._owner_arguments, args, strict=False)) | kwargs
        cache = given.get(self._stack.cache_name)
        mask: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if not self._calls:
            mask = plain_mask(self._copy.config, given, cache, None)
        self._calls.append(_Call(given, mask))

    def _at_first_slot(self, _slot: nn.Module, args: tuple[Any, ...]) -> None:
        # Not a twin's slot, and the masks of this call have been made.
        self._calls[-1].states = args[0]
        self._held.tokens += args[0].shape[1]


class _Repeating(LogitsProcessor):  # type: ignore[misc]
    """Chooses a prompt's last token again."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter(1, input_ids[:, -1:], 0.0)


def _window(layer: Any) -> int | None:
    window = getattr(layer, "sliding_window", None)
    return window if isinstance(window, int) else None
