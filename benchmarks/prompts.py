"""Prompts of three kinds, made from what installed packages ship: `edit`, `code` and `chat`.

They differ in how much of the answer is in the prompt, and so in how well it can be guessed. The texts are those of
scikit-learn's data sets and of Python's library, so they depend a little on the versions of both.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import importlib.util
import inspect
import itertools
import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = ("edit", "code", "chat")

#: Number of prompts of each kind.
PROMPTS = 20

QUESTIONS = (
    "What are the most important causes of the First World War?",
    "Explain how a bicycle stays upright.",
    "Give me a plan for a three day visit to Rome.",
    "Write a short story about a fox and a crow.",
    "What is the difference between a virus and a bacterium?",
    "How do I make pancakes?",
    "Tell me about the history of the printing press.",
    "Why is the sky blue?",
    "Write a polite e-mail asking for a refund.",
    "What should I consider when buying a used car?",
    "Describe how photosynthesis works.",
    "Give five tips to learn a language.",
    "How does a refrigerator keep food cold?",
    "What happened at the Battle of Hastings?",
    "Recommend a weekly exercise plan for a beginner.",
    "Explain inflation to a child.",
    "Write a poem about the sea in autumn.",
    "What are the advantages and disadvantages of solar power?",
    "How can I sleep better?",
    "Summarize the plot of Romeo and Juliet.",
)


def prompts(count: int = PROMPTS) -> dict[str, list[str]]:
    """The first prompts of each kind: what a user says, without a chat template.

    Args:
        count: the number of each kind, at most `PROMPTS`.

    Raises:
        RuntimeError: the installed packages ship too few texts.
    """
    found = {"edit": list(_edits()), "code": list(_code()), "chat": list(QUESTIONS)}
    if too_few := [kind for kind in KINDS if len(found[kind]) < count]:
        raise RuntimeError(f"fewer than {count} prompts of kind {', '.join(too_few)} in the installed packages")
    return {kind: found[kind][:count] for kind in KINDS}


def encoded_prompt(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a conversation in which a user has said this; of the text alone without a chat template."""
    from split_device.generation.tokenizing import encode_chat

    tokens: list[int] = encode_chat(tokenizer, [{"role": "user", "content": text}])[0].tolist()
    return tokens


def _edits() -> Iterator[str]:
    """Texts to repeat with small changes, of two sorts by turns."""
    for number, text in enumerate(itertools.islice(_paragraphs(), PROMPTS)):
        if number % 2 == 0:
            yield f'Rewrite the following text. Keep every sentence, but write "data" as "records". Text:\n\n{text}'
        else:
            mistaken = text.replace("the ", "teh ")
            yield f"Fix the spelling in this text and return the whole text:\n\n{mistaken}"


def _paragraphs() -> Iterator[str]:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise RuntimeError("the prompts are made from scikit-learn's texts: install scikit-learn")
    for path in sorted((Path(spec.origin).parent / "datasets" / "descr").glob("*.rst")):
        for paragraph in path.read_text().split("\n\n"):
            text = paragraph.replace("\n", " ").strip()
            if 200 < len(text) < 1000 and text[0].isalpha():
                yield text


def _code() -> Iterator[str]:
    """Functions to write again, and beginnings of functions, by turns."""
    for number, source in enumerate(itertools.islice(_functions(), PROMPTS)):
        if number % 2 == 0:
            yield (
                f"Here is a Python function:\n\n```python\n{source}```\n\n"
                "Write the function again with type hints and a docstring."
            )
        else:
            yield f"Complete this Python code:\n\n```python\n{source[: len(source) // 2]}"


def _functions() -> Iterator[str]:
    modules: tuple[ModuleType, ...] = (textwrap, heapq, shutil, argparse, collections, inspect, json)
    for module in modules:
        for member in vars(module).values():
            if inspect.isfunction(member) and member.__module__ == module.__name__:
                source = inspect.getsource(member)
                if 600 < len(source) < 2500:
                    yield source
