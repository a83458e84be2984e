"""What layers pass to their attention, and keys and values of which shape, without attending to anything."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from split_common.compat.transformers import attention_implementation
from split_common.engine.attention import AttentionCall, call_of
from split_common.engine.pool import LayerShape
from split_common.models.layer_stack import LayerStack

#: Keyword arguments of attention that do not change it while tokens are causal.
HARMLESS = {
    "position_ids",
    "use_cache",
    "cache",
    "past_key_values",
    "cache_position",
    "is_causal",
    "training",
    "output_attentions",
}

#: The name under which the attention that only notes its calls is registered with transformers.
_NAME = "lambda_split_noting"

#: Tokens of the run.
_TOKENS = 3


class NotedCall(NamedTuple):
    call: AttentionCall
    shape: LayerShape
    #: The names of further arguments that may change the attention.
    others: list[str]


_noted: ContextVar[list[NotedCall]] = ContextVar("noted calls")


def _note(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Zeros `[batch, tokens, heads, value_width]`, with the signature of transformers' attention interface."""
    call = call_of(module, query, scaling, sliding_window, softcap, s_aux)
    others = [name for name, given in other.items() if given is not None and name not in HARMLESS]
    _noted.get().append(NotedCall(call, LayerShape(key.shape[1], key.shape[-1], value.shape[-1]), others))
    batch, heads, tokens, _ = query.shape
    return query.new_zeros(batch, tokens, heads, value.shape[-1]), None


AttentionInterface.register(_NAME, _note)


@torch.inference_mode()
def attention_calls(stack: LayerStack) -> list[NotedCall]:
    """The calls in a run of the stack's owner over random states. Raises what its layers raise."""
    calls: list[NotedCall] = []
    original = attention_implementation(stack.owner)
    token = _noted.set(calls)
    try:
        stack.owner.set_attn_implementation(_NAME)
        arguments = {"position_ids": torch.arange(_TOKENS)[None]} if stack.takes_positions else {}
        stack.owner(inputs_embeds=torch.randn(1, _TOKENS, stack.width), use_cache=False, **arguments)
    finally:
        stack.owner.set_attn_implementation(original)
        _noted.reset(token)
    return calls
