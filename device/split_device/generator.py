"""Stand-in: one request after another. To be replaced by the batched generator."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

OnToken = Callable[[int, Any, "bytes | None"], None]


@dataclass
class Request:
    prompt: list[int]
    config: GenerationConfig
    seed: int | None = None
    generated: list[int] = field(default_factory=list)
    sampler: bytes | None = None
    priority: int = 0


class Generation:
    def __init__(self, request: Request, on_token: OnToken) -> None:
        self.request = request
        self.on_token = on_token
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self._cancelled = False
        self._ended = threading.Event()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def cancel(self) -> None:
        self._cancelled = True


class Generator:
    def __init__(self, model: Any, *, max_requests: int = 64, kv_memory: int | None = None) -> None:
        self._model = model
        self._queue: queue.Queue[Generation | None] = queue.Queue()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_token: OnToken) -> Generation:
        generation = Generation(request, on_token)
        self._queue.put(generation)
        return generation

    def close(self) -> None:
        self._closing = True
        self._queue.put(None)
        self._thread.join()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loop(self) -> None:
        while (generation := self._queue.get()) is not None:
            try:
                generation.finish_reason = self._run(generation)
            except BaseException as error:
                generation.error = error
            generation._ended.set()

    @torch.inference_mode()
    def _run(self, generation: Generation) -> str:
        request, config = generation.request, generation.request.config
        random = torch.Generator()
        if request.sampler is not None:
            random.set_state(torch.frombuffer(bytearray(request.sampler), dtype=torch.uint8))
        elif request.seed is not None:
            random.manual_seed(request.seed)
        ids = [*request.prompt, *request.generated]
        cache = DynamicCache(config=self._model.config)
        done = len(request.generated)
        ends = config.eos_token_id or []
        while done < config.max_new_tokens:
            if generation._cancelled or self._closing:
                return "cancelled"
            new = ids[cache.get_seq_length() :] if cache.get_seq_length() else ids
            logits = self._model(torch.tensor([new]), past_key_values=cache).logits[:, -1].float()
            if config.do_sample:
                logits = TemperatureLogitsWarper(config.temperature)(None, logits)
                if config.top_k:
                    logits = TopKLogitsWarper(config.top_k)(None, logits)
                if config.top_p < 1.0:
                    logits = TopPLogitsWarper(config.top_p)(None, logits)
                token = int(torch.multinomial(logits.softmax(-1), 1, generator=random))
            else:
                token = int(logits.argmax())
            ids.append(token)
            done += 1
            generation.on_token(token, None, random.get_state().numpy().tobytes() if config.do_sample else None)
            if token in ends:
                return "stop"
        return "length"
