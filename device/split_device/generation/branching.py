"""Measures what drafts of several continuations bring, by real answers.

They cannot be predicted from a text: their drafters learn from what the model expects after wrong guesses, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from split_common.errors import MeasurementTimeout
from split_device.generation.generator import Generator, Request
from split_device.generation.settings import NO_END
from split_device.speculation.forecast import SampleText
from split_device.speculation.names import OFF


@dataclass(frozen=True)
class Answered:
    """What answers took, one after the other, after their first tokens."""

    tokens: int
    steps: int
    seconds: float


def answered(model: Any, texts: Sequence[SampleText], speculate: str, limit: float) -> Answered:
    """Has the texts answered by a drafter that has learnt nothing yet.

    Args:
        model: made by `SplitModelForCausalLM.from_pretrained`.
        texts: prompts, and the answers that will come.
        speculate: the drafter's name.
        limit: seconds that an answer may take.

    Raises:
        MeasurementTimeout: an answer took longer.
        UnsupportedFeature: the model cannot speculate.
        SplitError: a request failed.
    """
    tokens = steps = 0
    seconds = 0.0
    with Generator(model, prefix_cache=0, speculate=OFF) as generator:
        for text in texts:
            times: list[float] = []

            def note(*_: object, times: list[float] = times) -> None:
                times.append(time.perf_counter())

            config = GenerationConfig(
                do_sample=False, max_new_tokens=len(text.answer), eos_token_id=[NO_END], pad_token_id=0
            )
            generation = generator.submit(Request(text.prompt, config, speculate=speculate), note)
            try:
                generation.result(limit)
            except TimeoutError:
                generation.cancel()
                raise MeasurementTimeout(f"a short answer took longer than {limit:.0f} s") from None
            # A step brings one token, and those of its draft that were right.
            tokens += len(times) - 1
            steps += len(times) - 1 - generation.accepted_tokens
            seconds += times[-1] - times[0]
    return Answered(tokens, steps, seconds)
