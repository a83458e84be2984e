"""llama.cpp by llama-cpp-python: converts a checkpoint with llama.cpp's own script, and generates in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.systems.stream import Generate, Question, first, serve

#: Where `make bench-peers` unpacks the source, below the environment.
CONVERTER = Path("source") / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"

#: Tokens of a sequence.
CONTEXT = 1024


@contextmanager
def load(model: Path, work: Path, threads: int) -> Iterator[Generate]:
    from llama_cpp import GGML_TYPE_F32, Llama

    converted = work / "model.gguf"
    converter = Path(sys.prefix) / CONVERTER
    convert = [sys.executable, str(converter), str(model), "--outtype", "f32", "--outfile", str(converted)]
    done = subprocess.run(convert, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the converter failed: {done.stderr.strip().splitlines()[-1:]}")
    # Keys and values in float32 as well.
    llama = Llama(
        str(converted),
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )

    def generate(question: Question) -> Iterator[int]:
        # Without this it would reuse the keys and values of an earlier answer.
        llama.reset()
        return first(llama.generate(question.ids, temp=0.0, repeat_penalty=1.0), question.tokens)

    yield generate


if __name__ == "__main__":
    serve(load, sys.argv[1:])
