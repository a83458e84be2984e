"""Jobs from Python: `await Device(…).submit(…)` or `await ImageDevice(…).submit(…)` gives the output."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import UNSET, structs

from split_common.errors import ConfigError
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.grammar import grammar_of
from split_device.generation.settings import Sampling, check_stop, within_bounds
from split_device.generation.structured import StructuredOutputs
from split_device.images.settings import ImageSettings, check_size, pipeline_directory
from split_device.jobs.agent import running_agent
from split_device.jobs.follow import POLL_INTERVAL, image_output, text_output
from split_device.jobs.job import (
    FINAL,
    AnyTask,
    ImageChoice,
    ImageTask,
    Job,
    Message,
    ModelChoice,
    Task,
    adapter_choices,
    checkpoint,
)
from split_device.jobs.store import Store, store_path
from split_device.serving.fields import ApiError
from split_device.serving.media import with_local_files
from split_device.serving.openai.answers import assistant_message
from split_device.serving.openai.messages import parse_messages
from split_device.serving.openai.tools import parse_tool_use
from split_device.submission.many import SubmitsMany, SubmittedMany

if TYPE_CHECKING:
    from PIL import Image

_T = TypeVar("_T")
_P = TypeVar("_P")


class Device(SubmitsMany[str]):
    """Submits jobs to this user's store; an agent (`lambda-split agent start`) runs them.

    Args:
        model: a directory or hub id; the demo model if None.
        store_key: the file of the key that seals the store, if it is sealed.
        tokenizer: directory or hub id of the tokenizer, if it does not lie with the weights.
        adapter: the directory of a LoRA in PEFT's format, as `NAME=DIR` or `DIR`.
        options: `revision`, `head_layers`, `tail_layers`, `dtype` and `codec`, as for `SplitModelForCausalLM`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        store_key: Path | None = None,
        tokenizer: str | Path | None = None,
        adapter: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._model = ModelChoice(
            name=checkpoint(None if model is None else str(model)),
            tokenizer=UNSET if tokenizer is None else checkpoint(str(tokenizer)),
            adapters=UNSET if adapter is None else adapter_choices([str(adapter)]),
            **options,
        )
        self._store_key = store_key

    def submit(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        stop: Sequence[str] = (),
        priority: int = 0,
        key: str | None = None,
        group: str | None = None,
        request_id: str | None = None,
        sampling: Sampling | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        structured: StructuredOutputs | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        **fields: Any,
    ) -> SubmittedText:
        """Submits a user's message, or a conversation: messages in OpenAI's format, also with images, as data
        URLs or `file:///…`.

        Args:
            stop: texts at which the answer ends.
            priority: jobs with a higher one run first.
            key: a name for the job. If there is a job with this key, it is returned instead of a new one.
            group: name of the group that the job belongs to.
            request_id: the id by which logs name the job, 1 to 128 visible ASCII characters; None for the job's
                own id.
            sampling: how tokens are chosen, and their maximum number.
            chat_template: a template, in Jinja, instead of the tokenizer's.
            chat_template_kwargs: values for variables that the template reads.
            structured: what the answer has to look like.
            tools, tool_choice, parallel_tool_calls: what the model may call, in OpenAI's format. `message` of what
                this returns has the calls.
            fields: replace fields of `sampling`: `max_tokens`, `temperature`, `top_p`, `seed` and so on.

        Raises:
            JobsError: the job with this key asks for something else.
            ConfigError: the key is empty, the group has no valid name, the request id is not one, a number is out
                of bounds, or the conversation or the tools are not in OpenAI's format.
            StoreLocked, ConfigError: the store cannot be opened.
        """
        template = ChatTemplate(chat_template, dict(chat_template_kwargs or {}))
        chosen = dataclasses.replace(sampling or Sampling(), **fields).checked()
        task = self._task(prompt, stop, chosen, template, structured)
        if use := _parsed(parse_tool_use, _json(tools), _json(tool_choice), parallel_tool_calls):
            task = structs.replace(task, tool_use=use)
        return SubmittedText(
            _submit(task, priority, key, group, request_id, self._store_key), self._store_key, text_output
        )

    def submit_many(
        self,
        prompts: Iterable[str | Sequence[Mapping[str, Any]]],
        *,
        stop: Sequence[str] = (),
        priority: int = 0,
        group: str | None = None,
        sampling: Sampling | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        structured: StructuredOutputs | None = None,
        **fields: Any,
    ) -> SubmittedMany[str]:
        """Submits users' messages, or conversations: all of them or none.

        Args:
            stop, priority, group, sampling, chat_template, chat_template_kwargs, structured, fields: as for
                `submit`, for each prompt.

        Raises:
            ConfigError: `prompts` is one text, the group has no valid name, or a number is out of bounds.
            StoreLocked, ConfigError: the store cannot be opened.
        """
        chosen = dataclasses.replace(sampling or Sampling(), **fields).checked()
        template = ChatTemplate(chat_template, dict(chat_template_kwargs or {}))
        tasks = [self._task(prompt, stop, chosen, template, structured) for prompt in _check_prompts(prompts)]
        return _submit_many(tasks, priority, group, self._store_key, text_output)

    def _task(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        stop: Sequence[str],
        sampling: Sampling,
        template: ChatTemplate,
        structured: StructuredOutputs | None,
    ) -> Task:
        if structured is not None:
            grammar_of(structured)
        told = (Message("user", prompt),) if isinstance(prompt, str) else _parsed(parse_messages, _json(prompt))
        task = Task(
            model=self._model,
            prompt=told,
            sampling=sampling,
            stop=check_stop(stop),
            chat_template=template.unless_default(),
            structured=structured or UNSET,
        )
        return _parsed(with_local_files, task, [Path("/")])


class ImageDevice(SubmitsMany["Image.Image"]):
    """Submits images to this user's store, like `Device`.

    Args:
        model: the directory of a pipeline.
        store_key: the file of the key that seals the store, if it is sealed.
        options: `cut`, `codec`, `reuse` and `dtype`, as for `SplitUNet2DConditionModel`.
    """

    def __init__(self, model: str | Path, *, store_key: Path | None = None, **options: Any) -> None:
        self._model = ImageChoice(name=pipeline_directory(str(model)), **options)
        self._store_key = store_key

    def submit(
        self,
        prompt: str,
        *,
        priority: int = 0,
        key: str | None = None,
        group: str | None = None,
        request_id: str | None = None,
        settings: ImageSettings | None = None,
        **fields: Any,
    ) -> Submitted[Image.Image]:
        """Submits a prompt.

        Args:
            priority, key, group, request_id: as for `Device`.
            settings: how the image is made.
            fields: replace fields of `settings`: `steps`, `width`, `height`, `guidance`, `negative`, `seed`.

        Raises:
            JobsError: the job with this key asks for something else.
            ConfigError: the model cannot make an image of this size, the key is empty, the group has no valid name,
                the request id is not one, or a number is out of bounds.
            StoreLocked, ConfigError: the store cannot be opened.
        """
        task = ImageTask(model=self._model, prompt=prompt, settings=self._settings(settings, fields))
        id_ = _submit(task, priority, key, group, request_id, self._store_key)
        return Submitted(id_, self._store_key, _open_image)

    def submit_many(
        self,
        prompts: Iterable[str],
        *,
        priority: int = 0,
        group: str | None = None,
        settings: ImageSettings | None = None,
        **fields: Any,
    ) -> SubmittedMany[Image.Image]:
        """Submits prompts: all of them or none.

        Args:
            priority, group, settings, fields: as for `submit`, for each prompt.

        Raises:
            ConfigError: `prompts` is one text, the model cannot make an image of this size, the group has no valid
                name, or a number is out of bounds.
            StoreLocked, ConfigError: the store cannot be opened.
        """
        chosen = self._settings(settings, fields)
        tasks = [ImageTask(model=self._model, prompt=prompt, settings=chosen) for prompt in _check_prompts(prompts)]
        return _submit_many(tasks, priority, group, self._store_key, _open_image)

    def _settings(self, settings: ImageSettings | None, fields: dict[str, Any]) -> ImageSettings:
        chosen = dataclasses.replace(settings or ImageSettings(), **fields).checked()
        check_size(self._model.name, chosen)
        return chosen


def _submit(
    task: AnyTask,
    priority: int,
    key: str | None,
    group: str | None,
    request_id: str | None,
    store_key: Path | None,
) -> str:
    """Stores a job. Returns its id."""
    priority = within_bounds("priority", priority)
    with Store(store_path(), store_key) as store:
        return store.submit(task, priority, key, group, request_id).id


def _submit_many(
    tasks: Sequence[AnyTask],
    priority: int,
    group: str | None,
    store_key: Path | None,
    output: Callable[[Store, Job], _T],
) -> SubmittedMany[_T]:
    priority = within_bounds("priority", priority)
    with Store(store_path(), store_key) as store:
        return SubmittedMany(store.submit_ids(((task, priority, None) for task in tasks), group), store_key, output)


def _parsed(parse: Callable[..., _T], *values: object) -> _T:
    """What a parser of the server makes of values. Raises ConfigError where it raises ApiError."""
    try:
        return parse(*values)
    except ApiError as error:
        raise ConfigError(str(error)) from None


def _json(value: Any) -> Any:
    """Lists and dictionaries in place of other sequences and mappings. Values that JSON has no type for stay."""
    if isinstance(value, Mapping):
        return {name: _json(each) for name, each in value.items()}
    return [_json(each) for each in value] if isinstance(value, list | tuple) else value


def _check_prompts(prompts: Iterable[_P]) -> Iterable[_P]:
    """Returns prompts. Raises ConfigError for one text, whose characters would be prompts."""
    if isinstance(prompts, str):
        raise ConfigError("prompts is one text: pass a list of them")
    return prompts


def _open_image(store: Store, job: Job) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(image_output(store, job)))


class Submitted(Generic[_T]):
    """A job in the store. Awaiting it, like `result`, gives its output: a text or a Pillow image."""

    def __init__(self, id_: str, store_key: Path | None, output: Callable[[Store, Job], _T]) -> None:
        self.id = id_
        self._store_key = store_key
        self._output = output

    def job(self) -> Job:
        """The job as it is stored now. Raises UnknownJob."""
        with Store(store_path(), self._store_key) as store:
            return store.get(self.id)

    def cancel(self) -> None:
        """Cancels the job. Raises JobsError if it has ended."""
        with Store(store_path(), self._store_key) as store:
            store.cancel(self.id, lambda: running_agent() is None)

    def result(self, timeout: float | None = None) -> _T:
        """Waits for the output.

        Args:
            timeout: how long to wait, in seconds; None for no limit.

        Raises:
            JobsError: the job failed or was cancelled.
            TimeoutError: the job has not ended in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (found := self._outputs()):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.id} has not ended after {timeout:g} s")
            time.sleep(POLL_INTERVAL)
        return found[0]

    def __await__(self) -> Generator[Any, None, _T]:
        while not (found := self._outputs()):
            yield from asyncio.sleep(POLL_INTERVAL).__await__()
        return found[0]

    def _outputs(self) -> list[_T]:
        """The output as the only item; nothing before the job has ended."""
        with Store(store_path(), self._store_key) as store:
            job = store.get(self.id)
            return [self._output(store, job)] if job.state in FINAL else []


class SubmittedText(Submitted[str]):
    """A job whose output is a text."""

    def message(self, timeout: float | None = None) -> dict[str, Any]:
        """Waits for the answer, as a message in OpenAI's format that can be part of the next prompt.

        Beside `content`, it has `tool_calls` if tools were called, and `reasoning_content` if the model thought.

        Args:
            timeout: how long to wait, in seconds; None for no limit.

        Raises:
            JobsError, TimeoutError: as `result`.
        """
        self.result(timeout)
        with Store(store_path(), self._store_key) as store:
            progress = store.progress(self.id)
            return assistant_message(progress.text, progress.reasoning, progress.tool_calls)
