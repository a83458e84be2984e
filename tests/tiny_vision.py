"""Tiny random models that see images: six decoder layers of width 32, and a tower of two layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tiny import LAYERS, VOCABULARY, randomized, save_tokenizer

#: The tokens that stand for a place of an image, and for its begin and end.
IMAGE, BEGIN, END = 93, 94, 95

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 96,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}

_ALL: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_TOWER},
        "image_token_index": IMAGE,
    },
    # A tower of as many layers as the decoder has, and nearer to the root.
    "llava_deep": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": 32,
            **_TOWER,
            "num_hidden_layers": LAYERS,
        },
        "image_token_index": IMAGE,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", "head_dim": 8, **_TOWER},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": {"model_type": "internvl_vision", **_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    },
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text",
            **_TEXT,
            **_WINDOWS,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": False,
        },
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": BEGIN,
        "eoi_token_index": END,
    },
    "qwen3_vl": {
        "text_config": {"model_type": "qwen3_vl_text", **_TEXT, "rope_parameters": _ROPE},
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            **_QWEN,
            "intermediate_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **_QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", **_TEXT, "rope_parameters": _ROPE},
        "vision_config": {
            "model_type": "qwen2_5_vl_vision",
            **_QWEN,
            "intermediate_size": 48,
            "fullatt_block_indexes": [0, 1],
            "window_size": 16,
        },
        **_QWEN_TOKENS,
    },
}

#: Models for images and text of different builds.
KINDS = tuple(_ALL)


def config(kind: str, **changes: Any) -> Any:
    """The configuration of a kind of model."""
    return AutoConfig.for_model(**{"model_type": kind, **_ALL[kind], **changes})


def build(kind: str, **changes: Any) -> PreTrainedModel:
    """Make a model, on the CPU, in fp32: the same weights every time, none of them near to zero."""
    return randomized(AutoModelForImageTextToText, config(kind, **changes))


def save(kind: str, directory: Path, **changes: Any) -> Path:
    """Save a model as a checkpoint in `directory`."""
    build(kind, **changes).save_pretrained(directory)
    return directory


#: For each kind: how many tokens an image of 16 x 16 has, and the name of what marks them.
_PLACES = {"llava": 16, "llava_deep": 16, "mistral3": 4, "internvl": 4, "gemma3": 4, "qwen3_vl": 4, "qwen2_5_vl": 4}


def inputs(kind: str, images: int = 2, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `generate`: a row with `images` images between texts, and a row with one, padded on the left."""
    places = [IMAGE] * _PLACES[kind]
    one = [5, 17, 33, BEGIN, *places, END, 61, 12, 80]
    rows = [one[:-2] * images + [7, 29, 44], one]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    given = {"input_ids": ids, "attention_mask": mask}
    generator = torch.Generator().manual_seed(seed)
    count = images + 1
    types = (ids == IMAGE).long()
    match kind:
        case "qwen3_vl" | "qwen2_5_vl":
            given["pixel_values"] = torch.randn(16 * count, 3 * 2 * 4 * 4, generator=generator)
            given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
            given["mm_token_type_ids"] = types
        case _:
            given["pixel_values"] = torch.randn(count, 3, 16, 16, generator=generator)
            if kind == "gemma3":
                given["token_type_ids"] = types
            if kind == "mistral3":
                given["image_sizes"] = torch.tensor([[16, 16]] * count)
    return given


_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_processor(directory: Path) -> Path:
    """Save a processor of LLaVA's kind beside a model: a tokenizer of characters, and images of 16 x 16."""
    save_tokenizer(directory)
    file = directory / "tokenizer.json"
    described = json.loads(file.read_text())
    # The character that has the number of the image's token gives way to it.
    vocabulary = described["model"]["vocab"]
    vocabulary.pop(next(token for token, number in vocabulary.items() if number == IMAGE))
    vocabulary["<image>"] = IMAGE
    file.write_text(json.dumps(described))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, extra_special_tokens={"image_token": "<image>"})
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",  # noqa: S106
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    processor.save_pretrained(directory)
    return directory
