"""Tiny models of the types that transformers knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.structure_sizes import LAYERS, VOCABULARY, WIDTH
from benchmarks.structures import PROMPT, causal_types, image_text_types, save, tiny_config


def test_all_types_are_known() -> None:
    assert {"llama", "qwen3_next", "nemotron_h"} <= set(causal_types())
    assert {"qwen3_vl", "mistral3"} <= set(image_text_types()) - set(causal_types())


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_vl", "nemotron_h", "deepseek_v32", "llama4"])
def test_a_type_is_made_small_and_has_all_kinds_of_its_layers_in_the_body(model_type: str) -> None:
    text = tiny_config(model_type).get_text_config(decoder=True)
    assert (text.num_hidden_layers, text.vocab_size, text.hidden_size) == (LAYERS, VOCABULARY, WIDTH)
    kinds = getattr(text, "layer_types", None) or []
    assert set(kinds[2:-2]) == set(kinds)


def test_a_change_reaches_a_part_of_the_configuration() -> None:
    text = tiny_config("llama4", text_config={"floor_scale": 2}).text_config
    assert (text.floor_scale, text.hidden_size) == (2, WIDTH)


def test_what_is_saved_is_read_by_transformers_and_says_different_things(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save("qwen3_5", tmp_path))
    answer = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=20)
    assert len(set(answer[0, PROMPT.shape[1] :].tolist())) >= 4
