"""Jobs from Python: `Device(…).submit(…)`, and `await` what it gives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from split_device.jobs.job import FINAL, Job, Message, ModelChoice, Task
from split_device.jobs.options import checkpoint
from split_device.jobs.store import Store, store_path
from split_device.jobs.watch import POLL_INTERVAL, answer
from split_device.settings import Sampling


class Device:
    """Submits jobs to this user's store; an agent (`lambda-split agent start`) runs them.

    Args:
        model: a directory or hub id; the demo model if None.
        store_key: the file of the key that seals the store, if it is sealed.
        options: `revision`, `head_layers`, `tail_layers` and `dtype`, as for `SplitModelForCausalLM`.
    """

    def __init__(self, model: str | Path | None = None, *, store_key: Path | None = None, **options: Any) -> None:
        self._model = ModelChoice(name=checkpoint(None if model is None else str(model)), **options)
        self._store_key = store_key

    def submit(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        stop: Sequence[str] = (),
        priority: int = 0,
        key: str | None = None,
        **sampling: Any,
    ) -> Submitted:
        """Submits a user's message, or a conversation.

        Args:
            stop: texts at which the answer ends.
            priority: jobs with a higher one run first.
            key: if there is a job of this key, it is the one.
            sampling: fields of `Sampling`: `max_tokens`, `temperature`, `top_p`, `top_k`, `seed`.

        Raises:
            JobsError: the job of this key asks for something else.
            StoreLocked, ConfigError: the store cannot be opened.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        task = Task(
            model=self._model,
            prompt=tuple(Message(message["role"], message["content"]) for message in messages),
            sampling=Sampling(**sampling),
            stop=tuple(stop),
        )
        with Store(store_path(), self._store_key) as store:
            return Submitted(store.submit(task, priority, key).id, self._store_key)


class Submitted:
    """A job in the store. Awaiting it gives its answer; so does `result`."""

    def __init__(self, id_: str, store_key: Path | None = None) -> None:
        self.id = id_
        self._store_key = store_key

    def job(self) -> Job:
        """How it stands now. Raises UnknownJob."""
        with Store(store_path(), self._store_key) as store:
            return store.get(self.id)

    def cancel(self) -> None:
        """Raises JobsError if it has ended."""
        with Store(store_path(), self._store_key) as store:
            store.cancel(self.id)

    def result(self, timeout: float | None = None) -> str:
        """The answer. Raises JobsError if the job failed or was cancelled, TimeoutError after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (text := self._answer()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"job {self.id} has not ended after {timeout:g} s")
            time.sleep(POLL_INTERVAL)
        return text

    def __await__(self) -> Generator[Any, None, str]:
        while (text := self._answer()) is None:
            yield from asyncio.sleep(POLL_INTERVAL).__await__()
        return text

    def _answer(self) -> str | None:
        with Store(store_path(), self._store_key) as store:
            job = store.get(self.id)
            return answer(store, job) if job.state in FINAL else None
