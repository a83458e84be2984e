"""Whether and how much a model thinks before it answers, as far as its chat template lets that be set."""

from __future__ import annotations

from typing import Any

from split_device.generation.chat_template import THINKING_SWITCHES
from split_device.serving.text_model import TextModel

#: The variable of chat templates for how much is thought, and the words that they know beside "low" and "medium".
_EFFORT = "reasoning_effort"
_MOST = {"xhigh": "high", "max": "high"}


def thinking_kwargs(model: TextModel, thinks: bool | None, effort: str | None) -> dict[str, Any]:
    """Values for variables of the chat template; none for what it does not read.

    Args:
        thinks: whether the model shall think; None leaves it to the template.
        effort: how much; None leaves it to the template.
    """
    read = model.template.variables(model.loaded.tokenizer)
    found: dict[str, Any] = {}
    switch = next((name for name in THINKING_SWITCHES if name in read), None)
    if thinks is not None and switch is not None:
        found[switch] = thinks
    if effort is not None and _EFFORT in read:
        found[_EFFORT] = _MOST.get(effort, effort)
    return found
