"""CTranslate2: converts a checkpoint with its own converter, and generates in float32."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.systems.stream import Generate, Question, first, serve


@contextmanager
def load(model: Path, work: Path, threads: int) -> Iterator[Generate]:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    converted = work / "ctranslate2"
    TransformersConverter(str(model)).convert(str(converted), quantization="float32")
    vocabulary = json.loads((converted / "vocabulary.json").read_text())
    generator = ctranslate2.Generator(
        str(converted), device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads
    )

    def generate(question: Question) -> Iterator[int]:
        # No token ends an answer: `first` does.
        steps = generator.generate_tokens(
            [vocabulary[token] for token in question.ids],
            max_length=question.tokens,
            sampling_topk=1,
            end_token=[],
        )
        return (step.token_id for step in first(steps, question.tokens))

    yield generate


if __name__ == "__main__":
    serve(load, sys.argv[1:])
