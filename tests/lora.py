"""LoRA adapters of tiny models, as PEFT writes them; and what PEFT's unsplit model says with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def save_lora(directory: Path, checkpoint: Path, seed: int = 0, **settings: Any) -> Path:
    """Writes an adapter with random weights, large enough to change what the model says."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**options | settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        # Without a copy of the weights of an output layer that is adapted.
        adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory


def unsplit(checkpoint: Path, adapter: Path | None = None) -> Any:
    """The whole model, with an adapter that is not merged into it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
