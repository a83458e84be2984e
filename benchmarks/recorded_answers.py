"""Greedy answers of an unsplit model with the likeliest tokens of each step: recorded once, used many times."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import note
from benchmarks.prompts import encoded_prompt, prompts

#: Most likely tokens that are recorded of each step.
TOP = 16

#: The logit of all other tokens.
UNLIKELY = -1e4


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about."""

    prompt: list[int]
    tokens: list[int]
    #: For each of the tokens, the most likely ones in its place, and their log probabilities.
    top: list[list[int]]
    logprobs: list[list[float]]

    def logits(self, vocabulary: int) -> Any:
        """What each token was chosen from: float32 `[tokens, vocabulary]`."""
        import torch

        logits = torch.full((len(self.tokens), vocabulary), UNLIKELY)
        return logits.scatter_(1, torch.tensor(self.top), torch.tensor(self.logprobs))


def record(model: Path, count: int, new_tokens: int) -> dict[str, list[Answer]]:
    """Answers to the first prompts of each kind, of at most so many tokens, in float32.

    The prompts of a kind are one padded batch, so that it takes minutes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    unsplit = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    end = unsplit.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    room = unsplit.config.max_position_embeddings - new_tokens
    answers: dict[str, list[Answer]] = {}
    for kind, texts in prompts(count).items():
        encoded = [encoded_prompt(tokenizer, text)[-room:] for text in texts]
        longest = max(map(len, encoded))
        # Padding is hidden by the mask, so any token does.
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in encoded])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in encoded])
        recorder = _Recorder()
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        output = unsplit.generate(ids, attention_mask=mask, logits_processor=[recorder], **options)
        answers[kind] = []
        for row, prompt in enumerate(encoded):
            tokens = output[row, longest:].tolist()
            length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
            top = [ids[row].tolist() for ids, _ in recorder.steps[:length]]
            logprobs = [values[row].tolist() for _, values in recorder.steps[:length]]
            answers[kind].append(Answer(prompt, tokens[:length], top, logprobs))
        note(f"recorded: {kind}, {sum(len(each.tokens) for each in answers[kind])} tokens")
    return answers


def save(answers: dict[str, list[Answer]], path: Path) -> None:
    path.write_text(json.dumps({kind: [asdict(each) for each in some] for kind, some in answers.items()}))


def load(path: Path) -> dict[str, list[Answer]]:
    return {kind: [Answer(**each) for each in some] for kind, some in json.loads(path.read_text()).items()}


class _Recorder:
    """A logits processor that changes nothing and keeps the most likely tokens of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any]] = []

    def __call__(self, ids: Any, scores: Any) -> Any:
        top = scores.log_softmax(-1).topk(min(TOP, scores.shape[-1]), dim=-1)
        self.steps.append((top.indices, top.values))
        return scores
