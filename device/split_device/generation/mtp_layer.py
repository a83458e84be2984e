"""MTP layers: those of a checkpoint that predict, after the model, one token more than the model does.

Multi-token prediction, after DeepSeek-V3 (arXiv 2412.19437, section 2.2): an MTP layer is a decoder layer of the
model's own kind. Its input is a projection of two vectors, each of which a norm precedes: the model's last hidden
state of a token, and the embedding of the token after it. The model's head makes logits of its output, after one
more norm. Which tensors are which, and of which kind the layer is, transformers says: no architecture is named.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from split_common.compat.transformers import mtp_names
from split_common.errors import MissingTensor, UnsupportedFeature
from split_common.models.layer_stack import LayerStack
from split_common.models.loading import ModelSpec, load_part, read_spec
from split_common.models.split import Split
from split_common.models.weights import read_tensors
from split_device.speculation.names import MTP

#: What precedes the names of the first MTP layer's tensors, and of those that its decoder layer has.
_LAYER, _BLOCK = "layers.0.", "layers.0.mtp_block."


@dataclasses.dataclass(frozen=True)
class MtpLayer:
    """The first MTP layer of a checkpoint."""

    #: A model of the checkpoint's class that has its decoder layer alone, in the first of its slots, and its stack.
    part: Any
    stack: LayerStack
    #: The configuration of `part`.
    config: Any
    #: Precede the projection: that of embeddings, and that of hidden states.
    embedding_norm: nn.Module
    state_norm: nn.Module
    #: Follows the layer.
    last_norm: nn.Module
    #: The projection `[width, 2 * width]`.
    projection: torch.Tensor

    @torch.inference_mode()
    def project(self, embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The decoder layer's input `[tokens, width]`.

        Args:
            embeddings: `[tokens, width]`, of the tokens after those of the states.
            states: `[tokens, width]`, the model's last hidden states, or what `normed` returned in their place.
        """
        both = [self.embedding_norm(self._here(embeddings)), self.state_norm(self._here(states))]
        if getattr(self.config, "mtp_hidden_states_first", False):
            both.reverse()
        return nn.functional.linear(torch.cat(both, -1), self.projection)

    @torch.inference_mode()
    def normed(self, outputs: torch.Tensor) -> torch.Tensor:
        """What the model's head takes, of the decoder layer's outputs `[tokens, width]`."""
        normed: torch.Tensor = self.last_norm(self._here(outputs))
        return normed

    def _here(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(self.projection.device, self.projection.dtype)


def load_mtp(name: str, revision: str | None, dtype: torch.dtype | None, device: torch.device) -> MtpLayer:
    """Loads the first MTP layer of a checkpoint.

    Args:
        name, revision: its directory, or its hub id and the branch, tag or commit.
        dtype: of the parameters and states; None keeps the checkpoint's.
        device: where it computes.

    Raises:
        UnsupportedFeature: it has none that can be run; the message has the reason.
        SplitError: its tensors cannot be read; as `load_part`.
    """
    spec = read_spec(name, revision)
    name = spec.checkpoint.name
    if spec.quantization is not None:
        raise UnsupportedFeature(f"{MTP} cannot be done with {name}: its weights are quantized")
    config = _mtp_config(spec)
    tensors = _tensors(spec, int(config.num_hidden_layers))
    block = {tensor[len(_BLOCK) :]: own for tensor, own in tensors.items() if tensor.startswith(_BLOCK)}
    state = read_tensors(spec.checkpoint, tensors.values())
    split = Split(int(config.num_hidden_layers), 0, 1)
    try:
        part, stack = load_part(
            dataclasses.replace(spec, config=config),
            split,
            "worker",
            dtype=dtype,
            state={f"{spec.prefix}.0.{tensor}": state[own] for tensor, own in block.items()},
        )
    except MissingTensor as error:
        raise MissingTensor(f"{error} of an MTP layer (model.layers.0 is its decoder layer)") from None
    part.to(device)
    norm = next((each for path, each in stack.slots[0].named_modules() if "norm" in path), None)
    if norm is None:
        raise UnsupportedFeature(f"{MTP} cannot be done with {name}: its layers have no norms")

    def weight(role: str) -> torch.Tensor:
        found = tensors.get(f"{_LAYER}{role}.weight")
        if found is None:
            raise MissingTensor(f"{name} lacks the tensor {role}.weight of an MTP layer")
        return state[found].to(device, part.dtype)

    def normed(role: str) -> nn.Module:
        own: nn.Module = type(norm)(config.hidden_size, eps=config.rms_norm_eps)
        own.load_state_dict({"weight": weight(role)}, assign=True)
        return own.eval().requires_grad_(False)

    return MtpLayer(part, stack, config, normed("enorm"), normed("hnorm"), normed("post_norm"), weight("eh_proj"))


def _mtp_config(spec: ModelSpec) -> Any:
    """The configuration of the MTP layers, as of a model that has them alone. Raises UnsupportedFeature."""
    name = spec.checkpoint.name
    own = copy.deepcopy(spec.text_config)
    if not getattr(own, "num_mtp_layers", None):
        raise UnsupportedFeature(
            f"{MTP} cannot be done with {name}: transformers knows of no MTP layers of its type ({own.model_type})"
        )
    if hasattr(own, "chain_hidden_post_norm"):
        raise UnsupportedFeature(f"{MTP} cannot be done with {name}: its MTP layers have another norm in common")
    try:
        return own.get_mtp_config()
    except ValueError as error:
        raise UnsupportedFeature(f"{MTP} cannot be done with {name}: {error}") from None


def _tensors(spec: ModelSpec, count: int) -> dict[str, str]:
    """The checkpoint's names of the first MTP layer's tensors, by those that transformers gives them.

    Raises:
        UnsupportedFeature: there are none.
    """

    def is_mtp(name: str) -> bool:
        layer = spec.layer_of(name)
        return layer >= spec.layers if layer is not None else any(part == "mtp" for part in name.split("."))

    own = mtp_names(spec.layers, count, filter(is_mtp, spec.checkpoint.tensor_names))
    found = {renamed: name for name, renamed in own.items() if renamed.startswith(_LAYER)}
    if not any(name.startswith(_BLOCK) for name in found):
        raise UnsupportedFeature(f"{MTP} cannot be done: {spec.checkpoint.name} has no tensors of MTP layers")
    return found
