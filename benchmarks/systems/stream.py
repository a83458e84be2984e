"""How a benchmark asks a program in another environment: lines of JSON on its stdin and stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Question:
    """What is to be answered greedily.

    Args:
        ids: the prompt as token ids, chat template included.
        text: the same as what a user says.
        tokens: how many to generate.
    """

    ids: list[int]
    text: str
    tokens: int


#: Answers a question, token by token: token ids, or text.
Generate = Callable[[Question], Iterable[int | str]]

#: Loads the checkpoint in a directory; may write to another one; for so many threads.
Load = Callable[[Path, Path, int], AbstractContextManager[Generate]]


def timed(generate: Generate, question: Question) -> dict[str, Any]:
    """An answer, and when each token came, in seconds since the question: `arrivals`, and `ids` or `text`."""
    began = time.perf_counter()
    arrivals: list[float] = []
    pieces: list[Any] = []
    for piece in generate(question):
        arrivals.append(time.perf_counter() - began)
        pieces.append(piece)
    told = {"text": "".join(pieces)} if pieces and isinstance(pieces[0], str) else {"ids": pieces}
    return {"arrivals": arrivals, **told}


def serve(load: Load, arguments: list[str]) -> None:
    """Answers what comes on stdin until it ends.

    Args:
        load: the system.
        arguments: the checkpoint's directory, one to write to, and the number of threads.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _private_stdout() as answers:

        def say(**told: Any) -> None:
            print(json.dumps(told), file=answers, flush=True)

        try:
            model, work, threads = arguments
            with load(Path(model), Path(work), int(threads)) as generate:
                say(ready=True)
                for line in sys.stdin:
                    say(**timed(generate, Question(**json.loads(line))))
        except Exception as error:
            text = str(error).strip().splitlines()
            say(error=f"{type(error).__name__}: {text[0] if text else ''}")
            raise


class _private_stdout(AbstractContextManager[TextIO]):  # noqa: N801
    """Yields stdout. What else is written there, by libraries, goes to stderr."""

    def __enter__(self) -> TextIO:
        self._file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


def first(pieces: Iterable[Any], count: int) -> Iterator[Any]:
    """The first of what comes. Asks for no more."""
    for number, piece in enumerate(pieces, 1):
        yield piece
        if number == count:
            return
