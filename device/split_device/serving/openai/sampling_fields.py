"""Fields of requests that say how tokens are chosen: OpenAI's, and those that vLLM adds to them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from split_common.errors import ConfigError
from split_device.generation.settings import Sampling
from split_device.serving.fields import ApiError

#: Fields of `Sampling` that are fields of a body, by the same names.
_SAME = ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "top_k", "min_p")
_MORE = ("repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "bad_words", "speculate")


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of a body. `BOUNDS` has those of most numbers; temperatures end at 2, as in OpenAI's API."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    #: Extensions of OpenAI's format, as vLLM has them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    #: An extension of ours.
    speculate: str | None = None

    def sampling(self, max_tokens: int, defaults: Sampling) -> Sampling:
        """How tokens are chosen.

        Args:
            max_tokens: the most tokens of the answer.
            defaults: settings of bodies that name none.

        Raises:
            ApiError: a value is out of bounds.
        """
        values = {name: getattr(self, name) for name in (*_SAME, *_MORE)}
        bias: Any = self.logit_bias
        try:
            return Sampling(max_tokens, logit_bias=bias, **values).filled(defaults).checked()
        except ConfigError as error:
            param = next((name for name in ("logit_bias", *_MORE) if name in str(error)), None)
            raise ApiError(str(error), param=param) from None
