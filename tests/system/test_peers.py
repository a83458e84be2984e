"""What is measured beside other systems, as far as that goes without them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import PROGRAMS, Program, System, SystemFailed, same_answer
from benchmarks.systems.stream import Question, first, timed

QUESTION = Question([1, 2], "why?", 3)

#: A program that counts, and writes to stdout what is no answer.
COUNTS = """
import contextlib, sys
from benchmarks.systems.stream import serve

@contextlib.contextmanager
def load(model, work, threads):
    print("loading", model)
    def generate(question):
        if question.text == "fail":
            raise ValueError("cannot count")
        print("counting")
        return iter(range(threads, threads + question.tokens))
    yield generate

serve(load, sys.argv[1:])
"""


@pytest.fixture
def counting() -> Iterator[Program]:
    program = Program([sys.executable, "-c", COUNTS, "model", "work", "2"])
    yield program
    program.close()


def test_a_program_answers_with_times(counting: Program) -> None:
    for tokens in (3, 2):
        told = counting.answer(Question([1, 2], "why?", tokens))
        assert told["ids"] == [2, 3, 4][:tokens]
        assert len(told["arrivals"]) == tokens
        assert told["arrivals"] == sorted(told["arrivals"])


def test_what_fails_is_left_out_with_the_reason(counting: Program) -> None:
    system = System(counting.answer)
    assert system.rate(QUESTION) > 0
    assert math.isnan(system.rate(Question([1], "fail", 3)))
    assert system.missing == "ValueError: cannot count"
    # It is not asked again.
    assert math.isnan(system.rate(QUESTION))
    short = System(lambda _: {"arrivals": [0.1, 0.2], "ids": [5, 6]})
    assert math.isnan(short.rate(QUESTION))
    assert short.missing == "2 tokens came instead of 3"


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_not_installed_says_so(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", PROGRAMS[name], str(tmp_path), str(tmp_path), "1"]
    with pytest.raises(SystemFailed, match="ModuleNotFoundError: No module named"):
        Program(command)
    with pytest.raises(SystemFailed, match="cannot start /nowhere/python: No such file"):
        Program(["/nowhere/python"])


def test_answers_are_compared_by_tokens_or_text() -> None:
    def decode(ids: list[int]) -> str:
        return "".join(map(chr, ids))

    expected = {"ids": [97, 98]}
    assert same_answer({"ids": [97, 98]}, expected, decode)
    assert not same_answer({"ids": [97]}, expected, decode)
    assert same_answer({"text": "ab"}, expected, decode)
    assert not same_answer({"text": "ac"}, expected, decode)


def test_text_is_joined_and_no_more_is_asked_for_than_is_wanted() -> None:
    asked: list[int] = []

    def words(_: Question) -> Iterator[str]:
        for number in range(100):
            asked.append(number)
            yield "ab"

    told: dict[str, Any] = timed(lambda question: first(words(question), question.tokens), QUESTION)
    assert told["text"] == "ababab"
    assert asked == [0, 1, 2]
