"""Many JSON Schemas: each answer is valid, or ended by its length, or its schema is refused by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer, GenerationConfig

from fleet import split_model
from grammar_walk import walk
from json_schemas import CHECKED_FORMATS, REFUSED, schemas
from split_common.errors import UnsupportedFeature
from split_device.generation.constraint import Grammars
from split_device.generation.generator import Generator, Request
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tokenizing import encode_chat, load_tokenizer
from tiny import VOCABULARY, save_tokenizer
from wiretap import LATE

#: Most tokens of an answer.
LENGTH = 200

FORMATS = jsonschema.FormatChecker(CHECKED_FORMATS)


def check(text: str, schema: Any) -> None:
    """Raises ValidationError or JSONDecodeError if a text is not what its schema says."""
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=FORMATS)


def check_refusal(error: UnsupportedFeature, schema: Any) -> None:
    assert any(name in str(error) for name, refused in REFUSED.items() if refused == schema)


@pytest.mark.long
def test_random_texts_are_valid(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    grammars = Grammars(tokenizer, VOCABULARY, {tokenizer.eos_token_id})
    texts = 0
    for seed, schema in enumerate(schemas(100)):
        try:
            text = walk(grammars.constraint(StructuredOutputs(json=schema)), tokenizer, seed)
        except UnsupportedFeature as error:
            check_refusal(error, schema)
            continue
        if text is not None:
            check(text, schema)
            texts += 1
    assert texts >= 85


@pytest.fixture(scope="module")
def generator(smollm2: Path) -> Iterator[Generator]:
    with split_model(smollm2) as model, Generator(model) as generator:
        yield generator


def ask(generator: Generator, smollm2: Path, wanted: list[Any], hot: int) -> Counter[str]:
    """Answers all schemas, so many at temperature 1.5. Returns how many were valid, too long, or refused."""
    tokenizer = load_tokenizer(str(smollm2))
    model = generator._model
    ends = {tokenizer.eos_token_id}
    grammars = Grammars(tokenizer, model.config.vocab_size, ends)
    asked: list[tuple[Any, Any]] = []
    outcomes: Counter[str] = Counter()
    for index, schema in enumerate(wanted):
        try:
            constraint = grammars.constraint(StructuredOutputs(json=schema))
        except UnsupportedFeature as error:
            check_refusal(error, schema)
            outcomes["refused"] += 1
            continue
        messages = [{"role": "user", "content": f"Answer with JSON that fits this schema: {json.dumps(schema)}"}]
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.5} if index < hot else {"do_sample": False}
        config = GenerationConfig(max_new_tokens=LENGTH, eos_token_id=tokenizer.eos_token_id, **sampling)
        prompt = encode_chat(tokenizer, messages)[0].tolist()
        seed = index if index < hot else None
        asked.append((schema, generator.submit(Request(prompt, config, seed=seed, constraint=constraint))))
    for schema, generation in asked:
        tokens = generation.result(LATE)
        if generation.finish_reason == "length":
            outcomes["length"] += 1
            continue
        check(tokenizer.decode(tokens, skip_special_tokens=True), schema)
        outcomes["valid"] += 1
    return outcomes


@pytest.mark.long
@pytest.mark.real_model
def test_a_model_answers_some(generator: Generator, smollm2: Path) -> None:
    outcomes = ask(generator, smollm2, [*schemas(300)[:285:14], *schemas(300)[-3:]], 6)
    assert outcomes["refused"] == 3
    assert outcomes["length"] <= 2


@pytest.mark.nightly
@pytest.mark.real_model
def test_a_model_answers_three_hundred(generator: Generator, smollm2: Path) -> None:
    outcomes = ask(generator, smollm2, schemas(300), 50)
    assert outcomes["refused"] == 15
    assert outcomes["length"] <= 30
