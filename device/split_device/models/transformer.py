"""`SplitSD3Transformer2DModel`, `SplitFluxTransformer2DModel`: transformers whose middle blocks run on a worker."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from split_common.errors import UnsupportedFeature
from split_common.models.denoisers.spec import DenoiserSpec
from split_common.models.denoisers.transformer import TransformerSpec
from split_common.models.split import Split
from split_device.models.connected import refuse_gradients
from split_device.models.context import CallContext
from split_device.models.denoiser import SplitDenoiser, arguments
from split_device.models.stand_ins import OnWorker, outline
from split_device.sessions.images import DenoiserInputs

#: Arguments of a transformer that concern blocks on the worker, and the features that use them.
_REFUSED = {
    "block_controlnet_hidden_states": "a ControlNet of a transformer",
    "controlnet_block_samples": "a ControlNet of a transformer",
    "controlnet_single_block_samples": "a ControlNet of a transformer",
}


@dataclass(frozen=True)
class TransformerCall:
    """The arguments of a transformer's call that the body's first slot needs."""

    timestep: float
    #: Tensors that tell one image from another.
    about: Sequence[torch.Tensor]
    #: Tensors of an image that the worker needs besides its steps.
    conditioning: Sequence[torch.Tensor]


_calls: CallContext[TransformerCall] = CallContext("transformer")


class TransformerSlot(OnWorker):
    """The place of a block that is on the worker. Has stand-ins for its modules, and passes its inputs on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        outline(self, block)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The scale of a LoRA is already applied to the blocks on this device.
        if strange := sorted((options.get("joint_attention_kwargs") or {}).keys() - {"scale"}):
            raise UnsupportedFeature(f"{strange[0]} does not run split: it concerns blocks that are on the worker")
        return encoder_hidden_states, hidden_states


class FirstSlot(TransformerSlot):
    """The body's first block: calls the worker, so the other slots only pass its output on."""

    def __init__(self, block: nn.Module, run: Callable[[float, DenoiserInputs], torch.Tensor]) -> None:
        super().__init__(block)
        self._run = run

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        super().forward(hidden_states, encoder_hidden_states, temb, **options)
        call, text = _calls.get(), encoder_hidden_states.shape[1]
        assert call is not None, "a slot is called by the transformer"
        output = self._run(
            call.timestep,
            DenoiserInputs([hidden_states, temb, encoder_hidden_states], call.conditioning, about=call.about),
        )
        return output[:, :text], output[:, text:]


class SplitTransformer(SplitDenoiser):
    """Common base of the split transformers."""

    _signature: ClassVar[inspect.Signature]

    def _cut(self, spec: DenoiserSpec, split: Split) -> None:
        assert isinstance(spec, TransformerSpec)
        for number, (stack, index) in enumerate(spec.places(split)):
            blocks = getattr(self, stack)
            block = blocks[index]
            blocks[index] = FirstSlot(block, self._run) if number == 0 else TransformerSlot(block)

    @staticmethod
    def _base(inputs: DenoiserInputs) -> torch.Tensor:
        """The text's and the image's tokens, to which the blocks add their output."""
        image, _, text = inputs.tensors
        return torch.cat((text, image), 1)

    def _job(self, _given: dict[str, Any]) -> Sequence[torch.Tensor]:
        """Tensors of an image that the worker needs besides its steps."""
        return ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Works like diffusers'.

        Raises:
            UnsupportedFeature: an argument does not run split; nothing was sent.
            SplitError: the worker or the queue failed.
        """
        given = arguments(self._signature, self, *args, **kwargs)
        self.check_process()
        refuse_gradients(given["hidden_states"])
        for name, what in _REFUSED.items():
            if given.get(name) is not None:
                raise UnsupportedFeature(f"{what} does not run split: it concerns blocks that are on the worker")
        if set(given.get("skip_layers") or ()) & set(self.split.body):
            raise UnsupportedFeature("skip_layers names blocks that are on the worker, which cannot be skipped")
        call = TransformerCall(
            float(torch.as_tensor(given["timestep"]).max()),
            (given["encoder_hidden_states"], given["pooled_projections"]),
            self._job(given),
        )
        with _calls.entered(call):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def enable_cache(self, *_args: Any, **_options: Any) -> None:
        """Refused: diffusers' caches hook blocks that are on the worker."""
        raise UnsupportedFeature("diffusers' caches do not run split: use reuse=, which saves calls of the worker")


class SplitSD3Transformer2DModel(SplitTransformer, SD3Transformer2DModel):  # type: ignore[misc]
    """SD 3's transformer with its body on a worker, for `transformer=` of a pipeline. Made by `from_pretrained`."""

    _signature = inspect.signature(SD3Transformer2DModel.forward)


class SplitFluxTransformer2DModel(SplitTransformer, FluxTransformer2DModel):  # type: ignore[misc]
    """Flux's transformer with its body on a worker, for `transformer=` of a pipeline. Made by `from_pretrained`."""

    _signature = inspect.signature(FluxTransformer2DModel.forward)

    def _job(self, given: dict[str, Any]) -> Sequence[torch.Tensor]:
        """The positions of the tokens, the same for all rows."""
        places = [given[name] if given[name].ndim == 2 else given[name][0] for name in ("txt_ids", "img_ids")]
        return [torch.cat(places).float().expand(len(given["hidden_states"]), -1, -1)]
