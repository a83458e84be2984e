"""Models that run jobs: each is loaded once, with a generator of its own."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from split_common.errors import PromptTooLong
from split_common.process import breakable
from split_common.slots import max_positions
from split_device.batching.generator import Generator, Request
from split_device.diffusion.options import need_diffusers
from split_device.jobs.job import ImageChoice, ModelChoice, Progress, Task
from split_device.model import SplitModelForCausalLM
from split_device.tokenizing import encode_chat, encode_text, end_tokens, load_tokenizer, pad_token

if TYPE_CHECKING:
    from split_device.diffusion.painter import Painter

#: Seeds of torch's generator are taken modulo this.
_SEEDS = 2**64


@dataclass(frozen=True)
class Queue:
    """How the workers are reached; see `SplitModelForCausalLM.from_pretrained`."""

    broker: str
    keys: Path | None = None
    member: str | None = None
    timeout: float = 10.0
    patience: float = 60.0
    step_timeout: float = 60.0


@dataclass(frozen=True)
class Limits:
    """What may be used at once.

    Args:
        jobs: generations.
        kv_memory: bytes for the keys and values of each model's head and tail.
        images: images.
    """

    jobs: int = 64
    kv_memory: int | None = None
    images: int = 2


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to generate."""

    model: Any
    tokenizer: Any
    generator: Generator

    @property
    def end_tokens(self) -> set[int]:
        return end_tokens(self.model)

    def request(self, task: Task, progress: Progress, priority: int) -> Request:
        """What the generator is asked for. Raises PromptTooLong, and ConfigError of the chat template."""
        if isinstance(task.prompt, str):
            ids = encode_text(self.tokenizer, task.prompt)
        else:
            messages = [{"role": message.role, "content": message.content} for message in task.prompt]
            ids = encode_chat(self.tokenizer, messages)
        prompt: list[int] = ids[0].tolist()
        limit = max_positions(self.model.config)
        if not prompt:
            raise PromptTooLong("the prompt has no tokens")
        if len(prompt) >= limit:
            raise PromptTooLong(f"{len(prompt)} tokens leave no room in the model's {limit} positions")
        sampling = task.sampling
        config = GenerationConfig(
            max_new_tokens=min(sampling.max_tokens, limit - len(prompt)),
            eos_token_id=sorted(self.end_tokens) or None,
            pad_token_id=pad_token(self.tokenizer),
            **sampling.options(),
        )
        seed = None if sampling.seed is None else sampling.seed % _SEEDS
        return Request(
            prompt,
            config,
            seed=seed,
            generated=progress.tokens,
            sampler=progress.sampler,
            priority=priority,
        )


class Models:
    """Loads models when they are asked for first. A context manager, which closes them."""

    def __init__(self, queue: Queue, limits: Limits) -> None:
        self.limits = limits
        self._queue = queue
        self._loaded: dict[ModelChoice, Loaded] = {}
        self._painters: dict[ImageChoice, Painter] = {}
        self._stack = contextlib.ExitStack()

    def get(self, choice: ModelChoice) -> Loaded:
        """Raises what `SplitModelForCausalLM.from_pretrained` and `load_tokenizer` raise."""
        if choice not in self._loaded:
            with breakable():
                self._loaded[choice] = self._load(choice)
        return self._loaded[choice]

    def _load(self, choice: ModelChoice) -> Loaded:
        tokenizer = load_tokenizer(choice.name, choice.revision)
        queue = self._queue
        model = self._stack.enter_context(
            SplitModelForCausalLM.from_pretrained(
                choice.name,
                broker=queue.broker,
                head_layers=choice.head_layers,
                tail_layers=choice.tail_layers,
                dtype=choice.dtype,
                revision=choice.revision,
                keys=queue.keys,
                member=queue.member,
                timeout=queue.timeout,
                patience=queue.patience,
                step_timeout=queue.step_timeout,
            )
        )
        limits = self.limits
        generator = Generator(model, max_requests=limits.jobs, kv_memory=limits.kv_memory)
        return Loaded(model, tokenizer, self._stack.enter_context(generator))

    def painter(self, choice: ImageChoice) -> Painter:
        """Raises what `load_denoiser` and `Painter` raise."""
        if choice not in self._painters:
            with breakable():
                self._painters[choice] = self._load_painter(choice)
        return self._painters[choice]

    def _load_painter(self, choice: ImageChoice) -> Painter:
        need_diffusers()
        from split_device.diffusion.kinds import load_denoiser
        from split_device.diffusion.painter import Painter

        queue = self._queue
        denoiser = self._stack.enter_context(
            load_denoiser(
                choice.name,
                broker=queue.broker,
                cut=choice.cut,
                codec=choice.codec,
                reuse=choice.reuse,
                dtype=choice.dtype,
                keys=queue.keys,
                member=queue.member,
                timeout=queue.timeout,
                patience=queue.patience,
                step_timeout=queue.step_timeout,
            )
        )
        return Painter(choice.name, denoiser, at_once=self.limits.images)

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
