"""Conversations as agents hold them: several at once, with instructions in common, sent whole at every turn."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from split_device.generation.generator import Generator, Request

#: Number of conversations in one request of the workload, and of their turns.
CONVERSATIONS = 4
TURNS = 3

#: Number of different instructions that conversations begin with, and of their tokens.
INSTRUCTIONS = 3
INSTRUCTION_TOKENS = 48

#: Fewest and most tokens of a question and of an answer.
QUESTION = 2, 24
ANSWER = 4, 24

#: Memory for keys and values of head and tail: so small that not all fits that could be kept.
KV_MEMORY = 1024**2


@dataclass
class Conversation:
    """What was said, and what is asked next: a question and the length of its answer for each turn."""

    said: list[int]
    turns: list[tuple[list[int], int]]


def draw(seed: int, device: int, number: int, vocabulary: int) -> list[Conversation]:
    """The conversations of a device's `number`-th request."""
    rng = random.Random(f"agents {seed} {device} {number}")

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1, vocabulary) for _ in range(count)]

    conversations = []
    for _ in range(CONVERSATIONS):
        instruction = random.Random(f"instruction {seed} {rng.randrange(INSTRUCTIONS)}")
        said = [instruction.randrange(1, vocabulary) for _ in range(INSTRUCTION_TOKENS)]
        turns = [(tokens(rng.randint(*QUESTION)), rng.randint(*ANSWER)) for _ in range(TURNS)]
        conversations.append(Conversation(said, turns))
    return conversations


def hold(generator: Generator, conversations: list[Conversation]) -> list[list[int]]:
    """Holds conversations at once. Returns all that was said in each. Raises SplitError."""
    for turn in range(TURNS):
        generations = []
        for conversation in conversations:
            question, length = conversation.turns[turn]
            conversation.said += question
            generations.append(generator.submit(Request(list(conversation.said), _greedy(length))))
        for conversation, generation in zip(conversations, generations, strict=True):
            conversation.said += generation.result()
    return [conversation.said for conversation in conversations]


def hold_unsplit(model: Any, conversations: list[Conversation]) -> list[list[int]]:
    """What is said in each with the unsplit model, one after the other."""
    import torch

    for conversation in conversations:
        for question, length in conversation.turns:
            ids = torch.tensor([[*conversation.said, *question]])
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=_greedy(length))
            conversation.said = output[0].tolist()
    return [conversation.said for conversation in conversations]


def answered_tokens(conversations: list[Conversation]) -> int:
    """How many tokens are generated in these conversations."""
    return sum(length for conversation in conversations for _, length in conversation.turns)


def _greedy(tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
