"""The language model that is served: its names, what it does by default, and encoding beside the event loop."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from split_common.errors import PromptTooLong, UnsupportedFeature
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.compilers import COMPILERS
from split_device.generation.settings import Sampling
from split_device.jobs.job import ModelChoice, Task
from split_device.jobs.message_images import has_images
from split_device.jobs.models import Loaded
from split_device.serving.answering import Answer
from split_device.serving.fields import ApiError, check_model
from split_device.serving.http import parse_body, read_body
from split_device.serving.media import with_local_files
from split_device.serving.streaming import ChoiceStream

_T = TypeVar("_T")

#: A prompt of more characters, or a body of more bytes, has to wait for others of this size alone: a million take a
#: second.
LONG = 256 * 1024

#: How deep texts lie in messages: in parts, and in the results of tools among these.
MESSAGE_DEPTH = 3

#: Counts of the generator that are shown as what a server saved.
_COUNTED = ("cached_tokens", "drafted_tokens", "accepted_tokens")


class TextModel:
    """A loaded model, for all dialects.

    Args:
        name: what clients call the model.
        aliases: further names of it.
        defaults: the temperature, top_p and top_k of requests that name none; None for the checkpoint's.
        template: how conversations become prompts.
        media: directories below which requests may name files of images.
        image_model: what clients call the image model that is served beside it, for messages.

    Raises:
        ConfigError: the template is not one, or does not read a variable that is set.
    """

    def __init__(
        self,
        loaded: Loaded,
        choice: ModelChoice,
        name: str,
        defaults: Sampling = Sampling(),
        template: ChatTemplate = ChatTemplate(),
        aliases: Sequence[str] = (),
        media: Sequence[Path] = (),
        image_model: str | None = None,
    ) -> None:
        template.check(loaded.tokenizer)
        self._media = media
        self._beside = [image_model] if image_model else []
        self.name = name
        self._aliases = aliases
        self.loaded = loaded
        self.choice = choice
        self.defaults = defaults
        self.template = template
        #: What clients call the model with each adapter: the adapter's name.
        self.adapters: list[str] = loaded.model.split_parts.adapters.names
        #: One thread for each tokenizer, which several may not call at once: for most prompts, and for long ones.
        self._encoding, self._long = (ThreadPoolExecutor(1, name) for name in ("encoding", "encoding-long"))
        #: For large bodies, and answers. More threads would not be faster: Python runs one at a time.
        self._large = ThreadPoolExecutor(1, "large-bodies")
        # The first request with a schema, too, finds a process that has started, and does not stop the others while
        # the vocabulary is read.
        COMPILERS.prepare()
        loaded.grammars.prepare()

    @property
    def names(self) -> list[str]:
        """The names by which requests choose the model alone, or with one of its adapters."""
        return [self.name, *self._aliases, *self.adapters]

    def adapter(self, asked: str) -> str:
        """The adapter of a request for the model of this name; "" for none. Raises ApiError if none has it."""
        check_model(asked, self.names, self._beside)
        return asked if asked in self.adapters else ""

    def parts(self) -> list[dict[str, Any]]:
        """Which layers run where."""
        split = self.loaded.model.split
        parts = (
            ("head", "device", 0, split.first),
            ("body", "worker", split.first, split.last),
            ("tail", "device", split.last, split.layers),
        )
        return [dict(zip(("name", "where", "first", "last"), part, strict=True)) for part in parts]

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer."""
        return self.loaded.limit

    def traffic(self) -> dict[str, int]:
        """What left this device since the start, tokens that did not, and drafts, summed over all requests."""
        traffic = self.loaded.model.traffic
        return {
            "steps": self.loaded.generator.counters["steps"],
            "bytes_sent": traffic["bytes_sent"],
            "bytes_received": traffic["bytes_received"],
            **{name: self.loaded.generator.counters[name] for name in _COUNTED},
        }

    def sampling(self) -> Sampling:
        """The temperature, top_p and top_k of a request that names none."""
        return self.defaults.resolved(self.loaded.model.generation_config)

    async def encode(self, task: Task) -> list[int]:
        """The token ids of a task's prompt. A long one takes seconds, in which other requests go on.

        When they are there, so is the grammar of what the answer has to look like.

        Raises what `Loaded.encode`, `with_local_files` and the future of `Grammars.compile` raise.
        """
        size = prompt_size(task)
        compiled = await self.aside(size, self._compiled, task)
        if compiled is not None:
            try:
                await asyncio.wrap_future(compiled)
            except UnsupportedFeature as error:
                raise ApiError(str(error), code="unsupported_parameter") from None
        return await self.beside(lambda loaded: loaded.encode(with_local_files(task, self._media)), size)

    def _compiled(self, task: Task) -> Future[Any] | None:
        """The grammar of what a task's answer has to look like; None for any text."""
        structured = self.loaded.structured(task)
        return None if structured is None else self.loaded.grammars.compile(structured)

    async def parsed(self, request: Request, parse: Callable[[object], _T]) -> _T:
        """What a parser makes of the body of a request. A large one takes seconds, in which other requests go on.

        Raises:
            PromptTooLong: there are more messages, items, or parts of them than the model has positions.
            ApiError, ConfigError: what `read_body`, `parse_body` and `parse` raise.
        """
        data = await read_body(request)
        return await self.aside(len(data), self._parsed, data, parse)

    def _parsed(self, data: bytearray, parse: Callable[[object], _T]) -> _T:
        body = parse_body(data)
        for name in ("messages", "input", "system"):
            given = body.get(name) if isinstance(body, dict) else None
            if isinstance(given, list) and (count := _entries(given)) > self.context:
                raise PromptTooLong(f"{name} has {count} entries, more than the model's {self.context} positions")
        return parse(body)

    async def aside(self, size: int, work: Callable[..., _T], *args: object) -> _T:
        """Calls a function that uses no tokenizer, while other requests go on. Raises what it raises.

        Args:
            size: about how many bytes it reads or writes. Small ones never wait for large ones.
        """
        threads = self._large if size > LONG else None
        return await asyncio.get_running_loop().run_in_executor(threads, functools.partial(work, *args))

    async def beside(self, work: Callable[[Loaded], _T], size: int) -> _T:
        """Calls a function that uses a tokenizer, while other requests go on. Raises what it raises.

        Args:
            work: gets the model with the tokenizer to use.
            size: the number of characters, or of tokens, that the tokenizer gets.
        """
        loop = asyncio.get_running_loop()
        if size <= LONG:
            return await loop.run_in_executor(self._encoding, work, self.loaded)
        return await loop.run_in_executor(self._long, lambda: work(self._with_copy))

    @functools.cached_property
    def _with_copy(self) -> Loaded:
        """The model with a copy of the tokenizer, made when the first long prompt comes."""
        return dataclasses.replace(self.loaded, tokenizer=copy.deepcopy(self.loaded.tokenizer))

    async def begin(self, answer: Answer, task: Task, prompt: list[int], **options: Any) -> ChoiceStream:
        """Begins another choice of an answer, while other requests go on.

        Further arguments and errors are those of `ChoiceStream`.
        """
        stream = ChoiceStream(self.loaded, task, prompt, **options)
        # Before it starts: if the client leaves meanwhile, it ends with the answer.
        answer.streams.append(stream)
        await self.aside(0, stream.start)
        return stream


def _entries(messages: list[Any]) -> int:
    """How many messages there are; or parts and calls of them, or parts of these, where those are more."""
    most, lists = 0, [messages]
    for _ in range(MESSAGE_DEPTH):
        most = max(most, sum(map(len, lists)))
        entries = (entry for each in lists for entry in each if isinstance(entry, dict))
        lists = [value for entry in entries for value in entry.values() if isinstance(value, list)]
    return most


def prompt_size(task: Task) -> int:
    """About how many characters a task's prompt has. One with images is not long: there is one processor."""
    if isinstance(task.prompt, str):
        return len(task.prompt)
    if has_images(task.prompt):
        return 0
    tools = len(msgspec.json.encode(task.tool_use)) if task.tool_use else 0
    return tools + sum(len(message.content) for message in task.prompt)
