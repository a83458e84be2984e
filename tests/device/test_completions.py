"""Text completions, token ids and names, as clients of OpenAI's older API and of vLLM's use them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from serving import KEY, Unsplit, serving
from split_device.serving.text_model import LONG

#: Seconds that something may take on a busy machine.
PATIENCE = 300.0

PROMPTS = ["Once", "There was a time"]


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    options = [
        "--served-model-name",
        "one",
        "--served-model-name",
        "org/two",
        "--api-key",
        "another",
        "--api-key",
        KEY,
    ]
    with serving(checkpoint, name="one", options=options) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def unsplit(checkpoint: Path) -> Unsplit:
    return Unsplit(checkpoint)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(model="one", **{"temperature": 0, "max_tokens": 6, **options})


def post(url: str, path: str, body: Any, key: str = KEY) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.post(url.replace("/v1", path), json=body, headers=headers, timeout=PATIENCE)


def scores(unsplit: Unsplit, ids: list[int]) -> torch.Tensor:
    """Log probabilities `[tokens, vocabulary]` of what follows each token."""
    with torch.no_grad():
        return torch.log_softmax(unsplit.model(torch.tensor([ids])).logits[0], -1)


def test_several_prompts(client: openai.OpenAI, unsplit: Unsplit) -> None:
    answer = ask(client, prompt=PROMPTS, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [
        unsplit.say(each, 6) for each in PROMPTS for _ in range(2)
    ]
    tokens = [len(unsplit.tokenizer(each)["input_ids"]) for each in PROMPTS]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(tokens), 24)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    texts = dict.fromkeys(range(2), "")
    for chunk in ask(client, prompt=PROMPTS, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [*texts.values()] == [unsplit.say(each, 6) for each in PROMPTS]


def test_each_choice_of_each_prompt_has_a_seed_of_its_own(client: openai.OpenAI, unsplit: Unsplit) -> None:
    answer = ask(client, prompt=PROMPTS, n=2, temperature=1, seed=3)
    expected = [unsplit.say(each, 6, seed) for each in PROMPTS for seed in (3, 4)]
    assert [choice.text for choice in answer.choices] == expected


def test_token_ids(client: openai.OpenAI, unsplit: Unsplit) -> None:
    ids = [unsplit.tokenizer(each)["input_ids"] for each in PROMPTS]
    assert ask(client, prompt=ids[0]).choices[0].text == unsplit.say(PROMPTS[0], 6)
    answer = ask(client, prompt=ids)
    assert [choice.text for choice in answer.choices] == [unsplit.say(each, 6) for each in PROMPTS]
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_a_prompt_is_repeated(client: openai.OpenAI, unsplit: Unsplit) -> None:
    expected = [each + unsplit.say(each, 6) for each in PROMPTS]
    assert [choice.text for choice in ask(client, prompt=PROMPTS, echo=True).choices] == expected
    streamed = ask(client, prompt=PROMPTS[1], echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[1]
    ids = unsplit.tokenizer(PROMPTS[1])["input_ids"]
    assert ask(client, prompt=ids, echo=True).choices[0].text == expected[1]
    alone = ask(client, prompt=PROMPTS[0], echo=True, max_tokens=0)
    assert (alone.choices[0].text, alone.choices[0].finish_reason) == (PROMPTS[0], "length")
    assert alone.usage.completion_tokens == 0


@pytest.mark.parametrize(("limit", "tokens"), [(0, 0), (1, 1), (4, 4)])
def test_log_probabilities_of_a_prompt(client: openai.OpenAI, unsplit: Unsplit, limit: int, tokens: int) -> None:
    """As lm-eval asks for them."""
    ids = unsplit.tokenizer(PROMPTS[1])["input_ids"]
    choice = ask(client, prompt=ids, echo=True, logprobs=1, max_tokens=limit).choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(ids) + tokens
    expected = scores(unsplit, ids)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    known = [float(expected[place, token]) for place, token in enumerate(ids[1:])]
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(known, abs=1e-4)
    best = [float(row.max()) for row in expected]
    told = [max(top.values()) for top in found.top_logprobs[1 : len(ids) + min(tokens, 1)]]
    assert told == pytest.approx(best[: len(told)], abs=1e-4)
    assert "".join(found.tokens) == choice.text
    pieces = zip(found.tokens, found.text_offset, strict=True)
    assert all(choice.text[offset:].startswith(token) for token, offset in pieces)


def test_log_probabilities_of_prompts_as_vllm_tells_them(url: str, unsplit: Unsplit) -> None:
    ids = unsplit.tokenizer(PROMPTS[1])["input_ids"]
    expected = scores(unsplit, ids)
    body = {
        "model": "one",
        "prompt": PROMPTS[1],
        "max_tokens": 2,
        "logprobs": 1,
        "echo": True,
        "prompt_logprobs": 3,
    }
    (choice,) = post(url, "/v1/completions", body).json()["choices"]
    first, *told = choice["prompt_logprobs"]
    assert first is None
    assert len(told) == len(ids) - 1
    for token, row, found in zip(ids[1:], expected, told, strict=False):
        best = row.topk(3)
        assert {int(id_) for id_ in found} == {token, *best.indices.tolist()}
        assert found[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert found[str(token)]["rank"] == int((row >= row[token]).sum())
        assert found[str(token)]["decoded_token"] == unsplit.tokenizer.decode([token])
    # What is repeated has its own number of alternatives.
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {1}
    hello = {"model": "one", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "n": 2}
    chat = post(url, "/v1/chat/completions", {**hello, "prompt_logprobs": 0}).json()
    assert [len(each) for each in chat["prompt_logprobs"][1:]] == [1] * (chat["usage"]["prompt_tokens"] - 1)
    assert len(chat["choices"]) == 2
    refused = post(url, "/v1/chat/completions", {**hello, "prompt_logprobs": 1, "stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")
    many = {"model": "one", "prompt": [5] * 250, "max_tokens": 1, "n": 128, "prompt_logprobs": 20}
    refused = post(url, "/v1/completions", many)
    assert "672,000 log probabilities of prompts are more than 524,288" in refused.json()["error"]["message"]


def test_offsets_of_a_stream_go_on(client: openai.OpenAI) -> None:
    whole = ask(client, prompt=PROMPTS[1], echo=True, logprobs=2).choices[0]
    pieces = [chunk.choices[0] for chunk in ask(client, prompt=PROMPTS[1], echo=True, logprobs=2, stream=True)]
    for name in ("tokens", "text_offset", "token_logprobs"):
        assert [each for piece in pieces for each in getattr(piece.logprobs, name)] == getattr(whole.logprobs, name)


def test_the_likeliest_choices_are_kept(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"prompt": PROMPTS, "temperature": 1, "seed": 5}
    every = ask(client, n=4, logprobs=0, **settings).choices

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    expected = [choice.text for own in (every[:4], every[4:]) for choice in sorted(own, key=mean, reverse=True)[:2]]
    answer = ask(client, n=2, best_of=4, **settings)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.logprobs for choice in answer.choices} == {None}
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in every)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": ["a"] * 1000}, "prompt"),
        ({"n": 1000}, "n"),
        ({"prompt": ["a", [1]], "max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [[1], [2, -1]]}, "prompt[1][1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
    ],
)
def test_what_is_refused_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **{"prompt": "a", **fields})
    assert refused.value.param == param


def test_a_token_that_the_model_has_not_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="10000000"):
        ask(client, prompt=[1, 10_000_000])


def test_names_and_keys(client: openai.OpenAI, url: str) -> None:
    cards = client.models.list().data
    assert [card.id for card in cards] == ["one", "org/two"]
    assert cards[0].max_model_len == client.models.retrieve("org/two").max_model_len > 0
    assert (
        ask(client, prompt="a").choices
        == client.completions.create(model="org/two", prompt="a", temperature=0, max_tokens=6).choices
    )
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tiny", prompt="a")
    body = {"prompt": "a"}
    statuses = [
        post(url, "/tokenize", body, key).status_code for key in (KEY, "another", "third", f"{KEY} another")
    ]
    assert statuses == [200, 200, 401, 401]
    assert httpx2.get(url.replace("/v1", "/version"), headers={"x-api-key": KEY}).json().keys() == {"version"}


def test_tokens_of_texts_and_conversations(url: str, unsplit: Unsplit) -> None:
    ids = unsplit.tokenizer(PROMPTS[1])["input_ids"]
    found = post(url, "/tokenize", {"model": "one", "prompt": PROMPTS[1], "return_token_strs": True}).json()
    assert (found["tokens"], found["count"]) == (ids, len(ids))
    assert found["token_strs"] == unsplit.tokenizer.convert_ids_to_tokens(ids)
    assert post(url, "/detokenize", {"tokens": ids}).json() == {"prompt": PROMPTS[1]}
    hello = [{"role": "user", "content": "Hello"}]
    found = post(url, "/tokenize", {"messages": hello}).json()
    assert unsplit.tokenizer.decode(found["tokens"]) == "user:Hello</s>assistant:"
    assert found["token_strs"] is None
    # By the tokenizer for long texts, for which no other request waits.
    text = "a " * (LONG // 2 + 1)
    assert post(url, "/tokenize", {"prompt": text}).json()["tokens"] == unsplit.tokenizer(text)["input_ids"]
    refused = post(url, "/tokenize", {"messages": hello * 10_000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    for path, body, param in (
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        (
            "/tokenize",
            {"messages": hello, "add_generation_prompt": False},
            "add_generation_prompt",
        ),
        ("/detokenize", {"tokens": [1, 10_000_000]}, "tokens[1]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ):
        refused = post(url, path, body)
        assert (refused.status_code in (400, 404), refused.json()["error"]["param"]) == (True, param)
