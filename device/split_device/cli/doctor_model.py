"""`lambda-split doctor --model`: whether a checkpoint runs split, how, and what of it is refused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from split_common.errors import InvalidSplit, SplitError
from split_device.cli.doctor_adapters import adapter_findings
from split_device.cli.finding import Finding

if TYPE_CHECKING:
    from split_common.models.checkpoint import Checkpoint
    from split_common.models.denoisers.spec import DenoiserSpec
    from split_common.models.loading import ModelSpec
    from split_common.models.split import Layers, Split

#: Number of layers, the first of the body, that are loaded to try them; more if a kind of layer begins later.
TRIED_LAYERS = 8

#: Memory for keys, values and states while layers are tried, in bytes. A sequence's states take up to some 100 MB.
TRIAL_BYTES = 1024**3

#: The cut in a refusal that names one that would do.
_OTHER_CUT = re.compile(r"--layers (\d+:-?\d*)")


def model_findings(
    model: str, adapters: Mapping[str, Path] | None = None, layers: Layers | None = None
) -> Iterator[Finding]:
    """How a worker and a device would run a checkpoint, found by loading and running parts of it as they do.

    Args:
        model: a directory with the checkpoint, a GGUF file, or a hub id.
        adapters: directories of LoRAs to try with it, by their names.
        layers: where to cut it; None for the usual cut, or another one where the usual one is refused.
    """
    from split_common.models.checkpoint import Checkpoint
    from split_common.models.denoisers.registry import is_denoiser, read_denoiser_spec
    from split_common.models.loading import read_spec

    try:
        checkpoint = Checkpoint.resolve(model)
        if is_denoiser(checkpoint):
            yield _blocks(read_denoiser_spec(checkpoint))
            if adapters:
                yield Finding("adapter", "problem", "--adapter is for language models")
            if layers is not None:
                yield Finding("layers", "problem", "--layers is for language models: --cut cuts image models")
            return
        spec = read_spec(checkpoint)
    except SplitError as error:
        yield Finding("model", "problem", str(error))
        return
    yield from _weights(spec)
    yield from _parts(spec, adapters or {}, layers)
    yield from _prompts(model, checkpoint)
    yield from _images(model, layers)


def _weights(spec: ModelSpec) -> Iterator[Finding]:
    """How quantized weights are run."""
    from split_device.models.sizes import quantized_weights

    if (weights := quantized_weights(spec)) is not None:
        yield Finding("weights", "ok", weights.describe())


def _parts(spec: ModelSpec, adapters: Mapping[str, Path], layers: Layers | None) -> Iterator[Finding]:
    """Tries a cut, or the usual one, and another one if that is refused and the refusal names one that would do."""
    from split_common.models.split import DEFAULT_LAYERS, Split

    if layers is not None:
        try:
            yield from _tried(spec, layers.split(spec.layers), adapters)
        except SplitError as error:
            yield Finding("model", "problem", str(error))
        return
    usual = Split.parse(spec.layers, str(DEFAULT_LAYERS)) if spec.layers > 2 else Split(spec.layers, 0, spec.layers)
    try:
        yield from _tried(spec, usual, adapters)
    except SplitError as error:
        other = _OTHER_CUT.search(str(error))
        if other is None:
            yield Finding("model", "problem", str(error))
            return
        yield Finding("layers", "note", f"only with --layers {other[1]}: {error}")
        try:
            yield from _tried(spec, Split.parse(spec.layers, other[1]), adapters)
        except SplitError as still:
            yield Finding("model", "problem", str(still))


def _tried(spec: ModelSpec, split: Split, adapters: Mapping[str, Path]) -> list[Finding]:
    """What running the first layers of a body, and loading a device's part, shows. Raises SplitError."""
    from split_common.engine.runner import build_runner
    from split_common.models.loading import load_part
    from split_common.models.split import Split

    some = Split(spec.layers, split.first, _last_tried(spec, split))
    _, stack = load_part(spec, some, "worker")
    runner = build_runner(stack, some, spec.text_config, TRIAL_BYTES)
    if runner.unpacked_because is None:
        found = [Finding("model", "ok", f"a worker runs many sessions in one forward (layers {some} were tried)")]
    else:
        found = [Finding("model", "note", f"a worker runs sessions one at a time: {runner.unpacked_because}")]
    if runner.indivisible:
        together = (
            "its layers give a different result for a prompt in parts, so prompts go through whole, without the "
            "prefix cache"
        )
        found.append(Finding("prompts", "note", together))
    if runner.padding_matters:
        refused = "its layers give a different result for a padded row, so rows with padding are refused"
        found.append(Finding("padding", "note", refused))
    load_part(spec, split, "device")
    ends = f"layers 0:{split.first} and {split.last}:{split.layers}"
    found.append(Finding("device", "ok", f"its own part loads: {ends}, embeddings and head"))
    return [*found, *_ends(spec, split), *adapter_findings(spec, split, some, adapters, TRIAL_BYTES)]


def _last_tried(spec: ModelSpec, split: Split) -> int:
    """The end of the layers that are tried: with each kind of layer that the body has, and no link across it."""
    from split_common.models.layer_links import find_links
    from split_device.models.sizes import layer_kinds

    kinds, links = layer_kinds(spec), find_links(spec.text_config)
    first = {kinds[index]: index for index in reversed(split.body)}
    end = max(split.first + TRIED_LAYERS, *(index + 1 for index in first.values()))
    while end < split.last and any(link.source < end <= link.user for link in links):
        end += 1
    return min(end, split.last)


def _ends(spec: ModelSpec, split: Split) -> Iterator[Finding]:
    """How commands run many requests at once through the device's own layers, unless they share forwards."""
    from split_common.engine.runner import build_runner
    from split_common.models.loading import load_part
    from split_common.models.split import Split

    for first, last in ((0, split.first), (split.last, split.layers)):
        if first == last:
            continue
        part = Split(spec.layers, first, last)
        try:
            _, stack = load_part(spec, part, "worker")
            reason = build_runner(stack, part, spec.text_config, TRIAL_BYTES).unpacked_because
        except SplitError as error:
            yield Finding("requests", "problem", f"the device's layers {part} cannot run for many at once: {error}")
            continue
        if reason is not None:
            yield Finding("requests", "note", f"the device's layers {part} run them one at a time: {reason}")


def _prompts(model: str, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Whether there is a tokenizer, and what its chat template reads."""
    from split_device.generation.chat_template import ChatTemplate
    from split_device.generation.tokenizing import load_tokenizer

    try:
        tokenizer = load_tokenizer(model)
        settable = ChatTemplate().variables(tokenizer)
    except SplitError as error:
        yield Finding("tokenizer", "note", f"{error}; --tokenizer names another one")
        return
    if not tokenizer.chat_template:
        detail = "no chat template: messages are joined by line ends, and --chat-template gives one"
        yield Finding("tokenizer", "note", detail)
        return
    reads = f"; --chat-template-kwargs sets {', '.join(sorted(settable))}" if settable else ""
    yield Finding("tokenizer", "ok", f"a {type(tokenizer).__name__} with a chat template{reads}")


def _images(model: str, layers: Layers | None) -> Iterator[Finding]:
    """What makes prompts with images, if the model takes any, and whether the head is long enough for them."""
    from split_common.models.loading import read_spec
    from split_common.models.split import DEFAULT_LAYERS, Layers
    from split_device.jobs.job import ModelChoice
    from split_device.jobs.models import find_processor
    from split_device.models.additions import layers_with_features

    if (processor := find_processor(ModelChoice(name=model))) is None:
        return
    yield Finding("images", "ok", f"a {type(processor).__name__} makes prompts with images")
    cut = layers or DEFAULT_LAYERS
    if (needed := layers_with_features(read_spec(model, images=True).config)) > cut.first:
        other = Layers(needed, cut.last)
        detail = f"images are refused with --layers {cut}, as their features are added after layers 0:{needed}"
        yield Finding("images", "note", f"{detail}: use --layers {other}")


def _blocks(spec: DenoiserSpec) -> Finding:
    """How much of a denoiser each cut leaves to the device."""
    from split_common.models.denoisers.spec import CUTS

    checkpoint = spec.checkpoint
    total = checkpoint.nbytes(checkpoint.tensor_names)
    shares = []
    for cut in CUTS:
        with contextlib.suppress(InvalidSplit):
            split = spec.split(cut)
            share = checkpoint.nbytes(spec.own_tensors(split, "device")) / total
            shares.append(f"cut {cut} (blocks {split}) leaves {share:.1%} of its {total:,} bytes here")
    return Finding("model", "ok", f"a {spec.class_name}: {', '.join(shares)}")
