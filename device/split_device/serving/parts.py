"""An answer as consecutive parts: what the model thought, text, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from split_device.serving.choices import Choice, TokenLogprobs, ToolCallDelta

PartKind = Literal["reasoning", "text", "call"]


@dataclass
class Part:
    """A part of an answer, which grows while it comes. A call's `text` is the JSON text of its arguments."""

    kind: PartKind
    #: Which part of the answer it is, from 0.
    index: int
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    #: Of a call: which of the answer's calls it is, its id, and the name of the tool.
    call: int = 0
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class PartEvent:
    """Something that happens to a part: it begins, grows by `text`, or ends."""

    kind: Literal["begin", "grow", "end"]
    part: Part
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    #: Whether it ends because the answer was cut off.
    cut_off: bool = False


class Parts:
    """Puts the pieces of one choice together to parts.

    What the model thought comes before the text of the same piece, and calls after it, but for the rest of a call
    that has begun.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._open: Part | None = None
        #: Tokens of the choice so far, how many of them are thinking once it has ended, and why it ended.
        self.tokens = self.reasoning_tokens = 0
        self.finish_reason: str | None = None
        self.stop_text: str | None = None

    def push(self, piece: Choice) -> Iterator[PartEvent]:
        """Adds a piece. Yields what it does to the parts."""
        self.tokens += piece.tokens
        self.reasoning_tokens += piece.reasoning_tokens
        rest = [call for call in piece.tool_calls if self._is_open(call)]
        for call in rest:
            yield from self._grow("call", call.arguments, None, call.index)
        if piece.reasoning:
            yield from self._grow("reasoning", piece.reasoning)
        if piece.text:
            yield from self._grow("text", piece.text, piece.logprobs)
        for call in piece.tool_calls:
            if call not in rest:
                yield from self._grow("call", call.arguments, None, call.index, call.id, call.name)
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_text = piece.finish_reason, piece.stop_text
            yield from self._close(piece.finish_reason not in ("stop", "tool_calls"))

    def _is_open(self, call: ToolCallDelta) -> bool:
        return self._open is not None and (self._open.kind, self._open.call) == ("call", call.index)

    def _grow(
        self,
        kind: PartKind,
        text: str,
        logprobs: list[TokenLogprobs] | None = None,
        call: int = 0,
        call_id: str = "",
        name: str = "",
    ) -> Iterator[PartEvent]:
        if self._open is None or (self._open.kind, self._open.call) != (kind, call):
            yield from self._close()
            self._open = Part(kind, len(self.parts), call=call, call_id=call_id, name=name)
            self.parts.append(self._open)
            yield PartEvent("begin", self._open)
        self._open.text += text
        self._open.logprobs += logprobs or ()
        if text:
            yield PartEvent("grow", self._open, text, logprobs or [])

    def _close(self, cut_off: bool = False) -> Iterator[PartEvent]:
        if self._open is not None:
            yield PartEvent("end", self._open, cut_off=cut_off)
        self._open = None


def whole(choice: Choice) -> Parts:
    """The parts of a whole choice."""
    parts = Parts()
    for _ in parts.push(choice):
        pass
    return parts
