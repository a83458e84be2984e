"""Chat templates: another one than the checkpoint's, and values for the variables that a template reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from split_common.errors import ConfigError, UnsupportedField
from split_common.system.files import user_path
from split_common.system.text import check_text, parse_json, read_text
from split_device.generation.content_parts import rendered
from split_device.generation.time_limit import within

_KWARGS = "--chat-template-kwargs"

#: Seconds that a template may take for a conversation. Those of real checkpoints take milliseconds.
RENDER_SECONDS = 10.0

#: A conversation, for templates whose beginning of an answer is the same for all.
_ANY = ({"role": "user", "content": "x"},)

#: Variables by which templates switch thinking on and off.
THINKING_SWITCHES = ("enable_thinking", "thinking")

#: Characters that a template has, and the name of a file seldom.
_JINJA = frozenset("{}\n")


class ChatTemplate(msgspec.Struct, frozen=True):
    """How a conversation becomes a prompt.

    Args:
        text: a Jinja template; None takes the checkpoint's.
        kwargs: values for variables of the template, as in vLLM's `chat_template_kwargs`.
        reasoning_effort: how much the model is to think, as in OpenAI's API. Older versions know none.
    """

    text: str | None = None
    kwargs: dict[str, Any] = {}
    reasoning_effort: str | msgspec.UnsetType = msgspec.UNSET

    def with_kwargs(self, own: Mapping[str, Any] | None) -> ChatTemplate:
        """This template, with values of a request's own before these."""
        return msgspec.structs.replace(self, kwargs={**self.kwargs, **own}) if own else self

    def with_reasoning_effort(self, effort: str | None) -> ChatTemplate:
        """This template, with a request's own effort before this one."""
        return self if effort is None else msgspec.structs.replace(self, reasoning_effort=effort)

    def unless_default(self) -> ChatTemplate | msgspec.UnsetType:
        """This template for a field that is left out of what is stored if it says nothing."""
        return self if self != ChatTemplate() else msgspec.UNSET

    def check(self, tokenizer: Any) -> None:
        """Raises ConfigError if a value would have no effect with this tokenizer, or the template is not Jinja."""
        if self.text is None and not tokenizer.chat_template:
            if self.kwargs:
                raise ConfigError(
                    "chat_template_kwargs have no effect: there is no chat template (see --chat-template)"
                )
            self.effort_values(frozenset())
            return
        settable = self.variables(tokenizer)
        for name in self.kwargs:
            if name not in settable:
                own = ", ".join(sorted(settable)) or "no variables that can be set"
                raise ConfigError(f"chat_template_kwargs cannot set {name!r}: the chat template reads {own}")
        self.effort_values(settable)

    def variables(self, tokenizer: Any) -> frozenset[str]:
        """The variables that the template reads and that can be set. Raises ConfigError if it is not Jinja."""
        # Loading takes seconds, and only what computes has to.
        from split_common.compat.transformers import reserved_template_variables

        return self._known(tokenizer) - reserved_template_variables(tokenizer)

    def reads_tools(self, tokenizer: Any) -> bool:
        """Whether the template shows tools to the model. Raises ConfigError if it is not Jinja."""
        return "tools" in self._known(tokenizer, tools=True)

    def source(self, tokenizer: Any, tools: bool = False) -> str:
        """The text of the template; empty if there is none. Some tokenizers have one of its own for tools."""
        if self.text is None and not tokenizer.chat_template:
            return ""
        try:
            return str(tokenizer.get_chat_template(self.text, tools=[{}] if tools else None))
        except ValueError as error:
            raise ConfigError(f"invalid chat template: {error}") from None

    def opening(self, tokenizer: Any) -> str:
        """What the template writes before an answer; empty if it refuses the shortest conversation."""
        try:
            return "" if not self.source(tokenizer) else self.render(tokenizer, _ANY, continues=False)
        except ConfigError:
            return ""

    def _known(self, tokenizer: Any, tools: bool = False) -> frozenset[str]:
        """All variables that the template reads. Raises ConfigError if it is not Jinja."""
        from split_common.compat.transformers import template_variables

        try:
            return template_variables(self.source(tokenizer, tools))
        except Exception as error:
            raise ConfigError(f"invalid chat template: {error}") from None

    def effort_values(self, settable: frozenset[str]) -> dict[str, Any]:
        """The values of variables that stand for the effort. Raises UnsupportedField if the template reads none."""
        effort = self.reasoning_effort
        if effort is msgspec.UNSET:
            return {}
        if "reasoning_effort" in settable:
            return {"reasoning_effort": effort}
        for name in THINKING_SWITCHES:
            if name in settable:
                return {name: effort != "none"}
        if effort != "none":
            raise UnsupportedField(
                f"reasoning_effort {effort!r} has no effect: the chat template does not read it", "reasoning_effort"
            )
        return {}

    def render(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        continues: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text of a conversation. `check` comes before.

        Args:
            continues: the last message is to be continued, so it is left open, and no answer is begun after it.
            tools: those that the model is shown, as transformers documents them.

        Raises:
            ConfigError: the template refuses the conversation, or takes longer than `RENDER_SECONDS`.
        """
        kwargs = {**self.effort_values(self.variables(tokenizer)), **self.kwargs}

        def render(conversation: Sequence[Mapping[str, Any]]) -> str:
            text: str = tokenizer.apply_chat_template(
                list(conversation),
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tools=list(tools) or None,
                **kwargs,
            )
            return text

        try:
            return within(RENDER_SECONDS, lambda: rendered(render, messages))
        except Exception as error:
            # The template is a program in the checkpoint. Some refuse system messages, for example.
            raise ConfigError(f"the model's chat template refuses this conversation: {error}") from None


def parse_template(text: str | None, kwargs: str | None) -> ChatTemplate:
    """The template of a command's options.

    Args:
        text: a file with a template, or the template itself.
        kwargs: a JSON object.

    Raises:
        ConfigError: there is no such file, it is not text, or `kwargs` is not an object.
    """
    values = parse_json(check_text(kwargs, _KWARGS).encode(), _KWARGS) if kwargs is not None else {}
    if not isinstance(values, dict):
        raise ConfigError(f'{_KWARGS} is not a JSON object, e.g. {{"enable_thinking": false}}')
    return ChatTemplate(None if text is None else _template_text(text), values)


def _template_text(given: str) -> str:
    if _JINJA & set(given):
        return check_text(given, "the chat template")
    path = user_path(given)
    if not path.is_file():
        raise ConfigError(f"{given} is neither a file nor a chat template")
    return read_text(Path(path))
