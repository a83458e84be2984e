"""How the next token is chosen, and the bounds of a request's numbers."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from split_common.errors import ConfigError

#: Seeds count modulo this: torch takes -1 for 2**64 - 1.
SEED_BOUND = 2**64

#: Below this, and at top_p 0, the likeliest token is taken, as in vLLM: logits divided by less are not finite.
GREEDY_TEMPERATURE = 1e-5


class Bounds(NamedTuple):
    """The least and the largest value of a number."""

    low: float
    high: float
    integral: bool = False


#: Bounds of a request's numbers: the same on the command line, in OpenAI's formats, and from Python.
BOUNDS = {
    # More tokens than a model has positions are cut down to these.
    "max_tokens": Bounds(1, 2**63 - 1, True),
    "temperature": Bounds(0, 100),
    "top_p": Bounds(0, 1),
    # 0 and -1 stand for all tokens.
    "top_k": Bounds(-1, 2**63 - 1, True),
    "seed": Bounds(-(2**63), SEED_BOUND - 1, True),
    "priority": Bounds(-(2**31), 2**31 - 1, True),
    "steps": Bounds(1, 1000, True),
    "guidance": Bounds(0, 1000),
    "strength": Bounds(0, 1),
}


def within_bounds(name: str, value: Any) -> Any:
    """A number of a request, as an int if it has to be integral, like 5.0.

    Raises:
        ConfigError: it is not a number, or not within `BOUNDS`.
    """
    low, high, integral = BOUNDS[name]
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or (integral and value != int(value)):
        kind = "an integer" if integral else "a number"
        raise ConfigError(f"invalid {name} {value!r}: expected {kind} from {low} to {high}")
    return int(value) if integral else float(value)


def checked(settings: Any, names: Iterable[str]) -> Any:
    """A copy of a dataclass whose fields of these names, unless they are None, are `within_bounds`."""
    given = {name: value for name in names if (value := getattr(settings, name)) is not None}
    return dataclasses.replace(settings, **{name: within_bounds(name, value) for name, value in given.items()})


def nth_seed(seed: int, index: int) -> int:
    """The seed of the choice with this index: with one seed, all choices would be the same."""
    return seed + index if seed + index < SEED_BOUND else seed + index - SEED_BOUND


#: Options of `generate` by which it returns tokens and nothing else, and keeps a cache.
_TOKENS_ALONE = {
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_cache": True,
}


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation; greedy if the temperature or top_p is 0."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def checked(self) -> Sampling:
        """A copy whose numbers are within their bounds. Raises ConfigError."""
        copy: Sampling = checked(self, [field.name for field in dataclasses.fields(self)])
        return copy

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        return self.temperature < GREEDY_TEMPERATURE or not self.top_p

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`. They replace the checkpoint's own sampling settings, and its forms of output."""
        if self.greedy:
            return _TOKENS_ALONE | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return _TOKENS_ALONE | {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(0, self.top_k),
        }
