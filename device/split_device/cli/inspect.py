"""`lambda-split inspect`: the parts of a split model, and their sizes."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption, ModelArgument
from split_common.models.adapters import parse_adapters
from split_common.models.checkpoint_files import model_name
from split_common.system.console import doing, emit_json, stdout
from split_device.cli.groups import TEXT_MODEL, TextModel
from split_device.cli.tables import parts_table


@grouped
def inspect(
    cut: Annotated[TextModel, TEXT_MODEL.without("model", "tokenizer", "codec")],
    model: ModelArgument = None,
    json: JsonOption = False,
) -> None:
    """Show which parts of a model the device keeps and which the worker runs; no weights are read.

    A model that cannot be split, or not at --layers, is refused with the reason. `lambda-split doctor --model`
    finds out how one runs, by running some of its layers.
    """
    choice = dataclasses.replace(cut, model=model).choice(several_adapters=True)
    with doing(f"reading the shapes of {model_name(choice.name)}"):
        import msgspec

        from split_common.models.cache_layers import make_cache, unpackable
        from split_common.models.layer_links import check_links
        from split_common.models.loading import read_spec
        from split_common.models.split import Split
        from split_common.models.tensors import parse_dtype
        from split_device.models.sizes import adapter_size, bytes_per_token, kinds, parts, quantized_weights

        spec = read_spec(choice.name, choice.revision)
    split = Split.from_head_tail(spec.layers, choice.head_layers, choice.tail_layers)
    check_links(spec.text_config, split, spec.checkpoint.name)
    alone = unpackable(make_cache(spec.text_config, split), split)
    dtype = parse_dtype(choice.dtype)
    rows = parts(spec, split, dtype)
    states = bytes_per_token(spec, dtype)
    weights = quantized_weights(spec, dtype)
    adapters = [adapter_size(spec, split, *each) for each in parse_adapters(cut.adapter or ()).items()]
    if json:
        emit_json(
            {
                "model": spec.checkpoint.name,
                "class": spec.model_class.__name__,
                "layers": spec.layers,
                "kinds": kinds(spec),
                "one_at_a_time": alone,
                "bytes_per_token": states,
                "parts": [msgspec.to_builtins(row) for row in rows],
                "quantization": msgspec.to_builtins(weights),
                "adapters": [msgspec.to_builtins(adapter) for adapter in adapters],
            }
        )
    else:
        stdout().print(parts_table(spec.checkpoint.name, rows))
        layers = ", ".join(f"{count} of {kind}" for kind, count in kinds(spec).items())
        print(f"{spec.model_class.__name__}, {spec.layers} layers: {layers}")
        if alone is not None:
            print(f"a worker runs sessions one at a time: {alone}")
        if weights is not None:
            print(weights.describe())
        for adapter in adapters:
            print(
                f"adapter {adapter.name} of rank {adapter.highest_rank} adds {adapter.device_bytes:,} bytes to the "
                f"device and {adapter.worker_bytes:,} to the worker"
            )
        print(f"{states:,} bytes of hidden states travel in each direction for each token")
