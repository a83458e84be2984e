"""Structured outputs: tokens for each trip to the worker, and what a mask costs. For `benchmarks.agents`."""

from __future__ import annotations

import statistics
import time
from typing import Any

from transformers import GenerationConfig

from split_device.generation.constraint import Grammars
from split_device.generation.generator import Generator, Request
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tokenizing import encode_chat

#: A schema with long keys, as agents send them.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer_identification_number": {"type": "integer", "minimum": 1, "maximum": 99999},
        "shipping_address_line_one": {"type": "string", "maxLength": 40},
        "preferred_contact_method": {"enum": ["electronic_mail", "telephone", "postal_service"]},
        "requested_delivery_date": {"type": "string", "format": "date"},
        "subscription_is_currently_active": {"type": "boolean"},
        "number_of_items_in_the_order": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": [
        "customer_identification_number",
        "shipping_address_line_one",
        "preferred_contact_method",
        "requested_delivery_date",
        "subscription_is_currently_active",
        "number_of_items_in_the_order",
    ],
    "additionalProperties": False,
}

QUESTION = "Anna, customer 4711, orders two red bicycles. Fill in the form as JSON."

#: Most tokens of an answer.
MAX_TOKENS = 200

#: How often a text goes through its constraint to measure the masks.
ROUNDS = 5


def forced(model: Any, tokenizer: Any) -> dict[str, float]:
    """Tokens for each trip of a greedy answer to `SCHEMA`; and seconds, with and without what is gained.

    Args:
        model: a split model with a worker.
    """
    grammars = _grammars(model, tokenizer)
    with Generator(model, speculate="off") as generator:

        def ask(logprobs: int | None) -> tuple[int, int, float]:
            request = _request(grammars, tokenizer, logprobs)
            before, began = generator.counters.copy(), time.perf_counter()
            generator.submit(request).result()
            seconds = time.perf_counter() - began
            tokens, steps = (generator.counters[name] - before[name] for name in ("tokens", "steps"))
            return tokens, steps, seconds

        ask(None)
        # With log probabilities, each token goes by itself.
        (tokens, steps, fast), (_, _, slow) = ask(None), ask(0)
    return {"tokens": tokens, "tokens_per_round_trip": tokens / steps, "seconds": fast, "seconds_one_by_one": slow}


def mask_us_per_token(model: Any, tokenizer: Any) -> float:
    """Microseconds for each token of an answer to `SCHEMA`: its mask, and going on after it. The median of rounds.

    Args:
        model: a split model with a worker.
    """
    grammars = _grammars(model, tokenizer)
    with Generator(model, speculate="off") as generator:
        tokens = generator.submit(_request(grammars, tokenizer, None)).result()
    rounds = []
    for _ in range(ROUNDS):
        constraint = grammars.constraint(StructuredOutputs(json=SCHEMA))
        began = time.perf_counter()
        for token in tokens:
            if constraint.forced() is None:
                constraint.mask()
            constraint.accept(token)
        rounds.append((time.perf_counter() - began) * 1e6 / len(tokens))
    return statistics.median(rounds)


def _grammars(model: Any, tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, model.config.get_text_config(decoder=True).vocab_size, {tokenizer.eos_token_id})


def _request(grammars: Grammars, tokenizer: Any, logprobs: int | None) -> Request:
    prompt = encode_chat(tokenizer, [{"role": "user", "content": QUESTION}])[0].tolist()
    config = GenerationConfig(do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=tokenizer.eos_token_id)
    constraint = grammars.constraint(StructuredOutputs(json=SCHEMA))
    return Request(prompt, config, constraint=constraint, logprobs=logprobs)
