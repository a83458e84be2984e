"""What does not run split, and bad input: a typed error that names it, before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationConfig, QuantizedCache, StaticCache

import tiny
from fleet import TRANSPORTS_IN_TURN, joined, running_broker, start_worker, using
from split_common.errors import (
    ConfigError,
    InvalidSplit,
    Malformed,
    NonFinite,
    PromptTooLong,
    UnknownModel,
    UnsupportedArchitecture,
    UnsupportedFeature,
)
from split_common.models.codecs import exact
from split_common.protocol import payloads
from split_device import SplitModelForCausalLM
from split_device.models import cache as cache_module

Model = Any

PROMPT = torch.tensor([[5, 17, 33, 4, 61, 12, 80]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [0]}


@pytest.fixture(scope="module", params=TRANSPORTS_IN_TURN)
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def broker(transport: str) -> Iterator[str]:
    with running_broker() as running:
        yield running.address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(broker: str, checkpoint: Path) -> Iterator[Model]:
    with joined(broker, checkpoint) as (model, _):
        yield model


@pytest.fixture(scope="module")
def headless(broker: str, checkpoint: Path) -> Iterator[Model]:
    """With the embedding alone before the body: what a test puts into the model is what travels."""
    with joined(broker, checkpoint, 0, 0) as (model, _):
        yield model


@pytest.fixture(scope="module")
def windowed(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with joined(broker, tiny.save("mistral", tmp_path_factory.mktemp("mistral"))) as (model, _):
        yield model


@pytest.fixture
def silent(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model; the test fails when it makes it send anything."""

    def fail(*_: object) -> None:
        pytest.fail("a session was opened")

    monkeypatch.setattr(model._client, "open_session", fail)
    return model


def offloaded(model: Model) -> DynamicCache:
    """Marked as such afterwards: the constructor wants an accelerator."""
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    return cache


def quantized(model: Model) -> QuantizedCache:
    """Without the quantizer, which is a package of its own."""
    cache: QuantizedCache = QuantizedCache.__new__(QuantizedCache)
    Cache.__init__(cache, layers=[])
    return cache


# --- options of generate and forward -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        *(
            ({"cache_implementation": name}, name)
            for name in ("static", "offloaded", "offloaded_static", "quantized", "hybrid")
        ),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, "static"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"generation_config": GenerationConfig(output_attentions=True)}, "output_attentions"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
        ({"speculate": "ngram"}, "speculate is an argument of Request"),
        ({"generation_config": GenerationConfig(speculate="ngram")}, "speculate is an argument of Request"),
    ],
)
def test_option_of_generate(silent: Model, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedFeature, match=word):
        silent.generate(PROMPT, **GREEDY, **options)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda model: StaticCache(config=model.config, max_cache_len=32), "StaticCache"),
        (offloaded, "offloaded"),
        (quantized, "QuantizedCache"),
    ],
    ids=["static", "offloaded", "quantized"],
)
def test_cache(silent: Model, make: Callable[[Model], Any], word: str) -> None:
    cache = make(silent)
    with pytest.raises(UnsupportedFeature, match=word):
        silent.generate(PROMPT, past_key_values=cache, **GREEDY)
    with pytest.raises(UnsupportedFeature, match=word):
        silent(PROMPT, past_key_values=cache)


def test_static_cache_by_default(silent: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set by the user on the model's own generation config."""
    monkeypatch.setattr(silent.generation_config, "cache_implementation", "static")
    with pytest.raises(UnsupportedFeature, match="static"):
        silent.generate(PROMPT, **GREEDY)


@pytest.mark.parametrize("name", ["output_attentions", "output_router_logits"])
def test_output_of_forward(silent: Model, name: str) -> None:
    with pytest.raises(UnsupportedFeature, match=name):
        silent(PROMPT, **{name: True})


def test_output_by_configuration(silent: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silent.config, "output_router_logits", True, raising=False)
    with pytest.raises(UnsupportedFeature, match="output_router_logits"):
        silent(PROMPT)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "save_pretrained"])
def test_method(silent: Model, name: str) -> None:
    with pytest.raises(UnsupportedFeature, match="split"):
        getattr(silent, name)([[5, 6]])


def test_gradients(silent: Model) -> None:
    embeddings = silent.get_input_embeddings()(PROMPT).clone().requires_grad_()
    with pytest.raises(UnsupportedFeature, match="gradients"):
        silent(inputs_embeds=embeddings)


def test_gradients_of_the_tail(broker: str, tmp_path: Path) -> None:
    """The tail may be trained: it needs the body's output alone."""
    with joined(broker, tiny.save("llama", tmp_path), 0, 2) as (model, _):
        model.lm_head.requires_grad_()
        model(PROMPT, labels=PROMPT).loss.backward()
        assert model.lm_head.weight.grad.norm() > 0


def test_packed_sequences_are_not_called_too_long(silent: Model) -> None:
    """Their positions begin again, so more tokens than positions are no reason."""
    limit = silent.split_parts.max_positions
    positions = torch.arange(limit).repeat(2)[None]
    with pytest.raises(UnsupportedFeature, match="packed sequences"):
        silent(torch.ones_like(positions), position_ids=positions, use_cache=False)


# --- masks and positions -----------------------------------------------------------------------------------


def test_mask_of_four_dimensions(silent: Model) -> None:
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedFeature, match="attention mask of shape"):
        silent(PROMPT, attention_mask=mask)


def test_prepared_masks(silent: Model) -> None:
    with pytest.raises(UnsupportedFeature, match="prepared attention masks"):
        silent(PROMPT, attention_mask={"full_attention": torch.ones(1, 1, 7, 7)})


@pytest.mark.parametrize("change", ["hide", "reveal"])
def test_mask_that_changes_what_is_cached(model: Model, change: str) -> None:
    cache = DynamicCache()
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, 0] = change == "hide"
    with torch.no_grad():
        model(PROMPT, attention_mask=mask[:, :7], past_key_values=cache)
    mask[0, 0] = 1 - mask[0, 0]
    with torch.no_grad(), pytest.raises(UnsupportedFeature, match="hides or reveals"):
        model(PROMPT[:, :1], attention_mask=mask, past_key_values=cache)


def test_padding_token_of_an_earlier_turn(model: Model) -> None:
    """`generate` takes it for padding, and the unsplit model would not see it any more."""
    cache = DynamicCache()
    prompt = torch.tensor([[5, 17, 0, 4, 61]])
    first = model.generate(prompt, attention_mask=torch.ones(1, 5), past_key_values=cache, **GREEDY)
    with pytest.raises(UnsupportedFeature, match="pad token"):
        model.generate(torch.cat([first, PROMPT], 1), past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("mask", [[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1]])
def test_padding_between_tokens_with_windows(windowed: Model, mask: list[int]) -> None:
    with pytest.raises(UnsupportedFeature, match="count cache indices"):
        windowed(PROMPT, attention_mask=torch.tensor([mask]))


@pytest.mark.parametrize("arch", ["bloom", "gpt_neo"])
def test_padding_between_tokens_where_indices_may_count(broker: str, tmp_path: Path, arch: str) -> None:
    with joined(broker, tiny.save(arch, tmp_path)) as (model, _):
        mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
        with pytest.raises(UnsupportedFeature, match="count cache indices"):
            model(PROMPT, attention_mask=mask)


def test_packed_sequences(silent: Model) -> None:
    with pytest.raises(UnsupportedFeature, match="packed"):
        silent(PROMPT, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False)


def test_positions_of_three_dimensions(silent: Model) -> None:
    axes = torch.arange(3)[:, None, None] * torch.ones(1, 1, 7, dtype=torch.long)
    context = cache_module.StepContext(positions=axes)
    layer = cache_module.SessionCacheLayer(silent._client, cache_module.Traits(False, False))
    with pytest.raises(UnsupportedFeature, match="position ids of shape"):
        layer.step(torch.zeros(1, 7, 32), context)


# --- caches of others --------------------------------------------------------------------------------------


def test_cache_of_an_unsplit_model(silent: Model) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        tiny.build("llama")(PROMPT, past_key_values=cache)
    for call in (silent, lambda *args, **kwargs: silent.generate(*args, **GREEDY, **kwargs)):
        with pytest.raises(UnsupportedFeature, match="unsplit model"):
            call(PROMPT, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT.shape[1]


def test_cache_of_a_split_model_in_an_unsplit_one(model: Model) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        with pytest.raises(UnsupportedFeature, match="on the worker"):
            tiny.build("llama")(PROMPT, past_key_values=cache)


@pytest.mark.parametrize("cut", [(2, 2), (1, 3)])
def test_cache_of_another_split_model(silent: Model, broker: str, checkpoint: Path, cut: tuple[int, int]) -> None:
    cache = DynamicCache()
    with joined(broker, checkpoint, *cut) as (other, _), torch.no_grad():
        other(PROMPT, past_key_values=cache)
        with pytest.raises(UnsupportedFeature, match="another split model"):
            silent(PROMPT, past_key_values=cache)


def test_cache_of_another_batch_size(headless: Model) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        headless(PROMPT, past_key_values=cache)
        with pytest.raises(UnsupportedFeature, match="1 rows, the batch has 2"):
            headless(PROMPT.repeat(2, 1), past_key_values=cache)


# --- lengths and values ------------------------------------------------------------------------------------


def test_prompt_that_is_too_long(silent: Model) -> None:
    prompt = torch.full((1, 257), 5)
    for call in (silent, silent.generate):
        with pytest.raises(PromptTooLong, match="257 tokens exceed the model's 256 positions"):
            call(prompt)


def test_answer_that_grows_too_long(model: Model) -> None:
    with pytest.raises(PromptTooLong):
        model.generate(torch.full((1, 254), 5), **{**GREEDY, "max_new_tokens": 8})


def test_not_a_number_in_a_prompt(silent: Model) -> None:
    embeddings = silent.get_input_embeddings()(PROMPT).clone()
    embeddings[0, 3, 1] = float("nan")
    with pytest.raises(NonFinite):
        silent(inputs_embeds=embeddings)


def test_not_a_number_under_padding_is_harmless(model: Model) -> None:
    """Padding does not travel. (Through the head, attention would carry it: this is the body alone.)"""
    context = cache_module.StepContext(mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]]))
    states = torch.randn(1, 7, 32)
    states[0, :2] = float("nan")
    layer = cache_module.SessionCacheLayer(model._client, cache_module.Traits(False, False))
    assert torch.isfinite(layer.step(states, context)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_worker_refuses_what_a_hostile_device_sends(
    model: Model, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "to_bytes", cache_module.raw_bytes)
    embeddings = model.get_input_embeddings()(PROMPT).clone()
    embeddings[0, 3, 1] = value
    cache = DynamicCache()
    with pytest.raises(NonFinite, match="the worker refused"):
        model(inputs_embeds=embeddings, past_key_values=cache)
    monkeypatch.undo()
    # The worker lives on, and the session of the refused step is over.
    model.generate(PROMPT, **GREEDY)


@pytest.mark.parametrize(
    ("rows", "select", "width"),
    [
        ([payloads.Run(0, 3, [3])], None, 32),
        ([payloads.Run(0, 0, [0])], [1], 32),
        ([payloads.Run(0, 0, [0])], None, 16),
        ([payloads.Run(0, 0, [0]), payloads.Run(0, 0, [0])], None, 8),
    ],
    ids=["gap", "select", "width", "narrow"],
)
def test_worker_refuses_a_step_that_does_not_fit(
    model: Model, rows: list[payloads.Run], select: list[int] | None, width: int
) -> None:
    session = model._client.open_session()
    step = payloads.Step("float32", width, rows, select)
    with pytest.raises(Malformed, match="the worker refused"):
        session.call([(step, bytes(step.tensor_bytes))])
    session.close()


def test_worker_refuses_positions_beyond_the_models(model: Model) -> None:
    session = model._client.open_session()
    step = payloads.Step("float32", 32, [payloads.Run(0, 0, [256])])
    with pytest.raises(PromptTooLong, match="the worker refused"):
        session.call([(step, bytes(step.tensor_bytes))])
    session.close()


def test_session_of_a_refused_step_is_opened_again(headless: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some chunks of a prefill may have run before the refusal: to continue there could give wrong tokens."""
    cache = DynamicCache()
    with torch.no_grad():
        headless(PROMPT, past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(exact, "to_bytes", cache_module.raw_bytes)
            poisoned = headless.get_input_embeddings()(PROMPT).clone()
            poisoned[0, -1] = float("nan")
            with pytest.raises(NonFinite):
                headless(inputs_embeds=poisoned, past_key_values=cache)
        again = headless(PROMPT, past_key_values=cache).logits
        expected = headless(PROMPT.repeat(1, 2)).logits[:, PROMPT.shape[1] :]
    assert torch.allclose(again, expected, atol=1e-4)


def test_refusal_before_sending_leaves_the_session_as_it_was(headless: Model) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        headless(PROMPT, past_key_values=cache)
        poisoned = torch.full((1, 1, 32), float("nan"))
        with pytest.raises(NonFinite):
            headless(inputs_embeds=poisoned, past_key_values=cache)
        again = headless(PROMPT, past_key_values=cache).logits
        expected = headless(PROMPT.repeat(1, 2)).logits[:, PROMPT.shape[1] :]
    assert torch.allclose(again, expected, atol=1e-4)


# --- the model and where it is cut -------------------------------------------------------------------------


def test_unknown_model(broker: str, tmp_path: Path) -> None:
    for name in (tmp_path / "none", "nobody/nothing", "not a name"):
        with pytest.raises(UnknownModel):
            SplitModelForCausalLM.from_pretrained(name, broker=broker)


def test_unknown_architecture(broker: str, tmp_path: Path) -> None:
    config = json.loads((tiny.save("llama", tmp_path) / "config.json").read_text())
    config["model_type"] = "teleprompter"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownModel, match="teleprompter"):
        SplitModelForCausalLM.from_pretrained(tmp_path, broker=broker)


@pytest.mark.parametrize(("head", "tail"), [(3, 3), (6, 0), (0, 7), (-1, 2), (2, -1)])
def test_cut_that_leaves_no_body(broker: str, checkpoint: Path, head: int, tail: int) -> None:
    with pytest.raises(InvalidSplit, match="a model of 6 layers"):
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker, head_layers=head, tail_layers=tail)


def test_unknown_dtype(broker: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="int4"):
        SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker, dtype="int4")


REASONS = {
    "t5": "t5 is not a decoder-only language model",
    "gemma3n_text": "layer",
    "gemma4_text": "layer",
    "bert": "BertLMHeadModel cannot be",
    "moshi": "the cache of layer . has a window and its attention has none",
}


@pytest.mark.parametrize("arch", tiny.REFUSED)
def test_architecture_that_cannot_be_split(broker: str, tmp_path: Path, arch: str) -> None:
    """The worker refuses to serve it; the device as well, unless it cannot tell from the layers that it has."""
    tiny.save(arch, tmp_path)
    with pytest.raises(
        UnsupportedArchitecture,
        match=REASONS.get(arch, "cannot be cut between its layers|keeps more between steps"),
    ):
        start_worker(tmp_path, broker)
    if arch in REASONS:
        with pytest.raises(UnsupportedArchitecture, match=REASONS[arch]):
            SplitModelForCausalLM.from_pretrained(tmp_path, broker=broker)
