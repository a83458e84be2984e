"""How the next token is chosen, and the bounds of a request's numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from split_common.errors import ConfigError
from split_common.system.files import user_path

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


#: `top_k` of transformers for a checkpoint that samples and names none.
_CHECKPOINT_TOP_K = 50


#: Fields of `Sampling` by which a token is chosen, and of which a checkpoint may have defaults.
_CHOSEN = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation; greedy if the temperature or top_p is 0.

    A temperature, top_p or top_k of None is left open: `filled` and `resolved` take it from elsewhere.
    """

    max_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def checked(self) -> Sampling:
        """A copy whose numbers are within their bounds. Raises ConfigError."""
        copy: Sampling = checked(self, [field.name for field in dataclasses.fields(self)])
        return copy

    def filled(self, defaults: Sampling) -> Sampling:
        """A copy that takes the temperature, top_p and top_k of `defaults` where it has none."""
        missing = [name for name, value in self.facts().items() if value is None]
        return dataclasses.replace(self, **{name: getattr(defaults, name) for name in missing})

    def resolved(self, config: Any) -> Sampling:
        """A copy that has a temperature, top_p and top_k: where it has none, those of a checkpoint.

        The checkpoint's are read as transformers reads them. If it does not sample (`do_sample`), nor does this,
        unless a top_p or top_k was asked for, which has an effect on sampling alone.

        Args:
            config: the `GenerationConfig` of the checkpoint.
        """
        samples = bool(config.do_sample)
        temperature = 1.0 if config.temperature is None else config.temperature
        return self.filled(
            Sampling(
                temperature=temperature if samples or self.asks_for_sampling else 0.0,
                top_p=1.0 if config.top_p is None else config.top_p,
                top_k=(_CHECKPOINT_TOP_K if samples else 0) if config.top_k is None else config.top_k,
            )
        )

    @property
    def asks_for_sampling(self) -> bool:
        """Whether a top_p or top_k is set that has an effect on sampling alone."""
        return (self.top_p is not None and 0 < self.top_p < 1) or (self.top_k or 0) > 0

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one, whatever the checkpoint's defaults."""
        return (self.temperature is not None and self.temperature < GREEDY_TEMPERATURE) or self.top_p == 0

    def facts(self) -> dict[str, Any]:
        """The temperature, top_p and top_k, by these names."""
        return {name: getattr(self, name) for name in _CHOSEN}

    def __str__(self) -> str:
        if self.greedy:
            return "greedy (temperature 0)"
        return ", ".join(f"{name} {value:g}" for name, value in self.facts().items() if value is not None)

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`, of settings that are `resolved`.

        They replace the checkpoint's own sampling settings, and its forms of output.
        """
        if self.greedy:
            return _TOKENS_ALONE | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return _TOKENS_ALONE | {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(0, self.top_k or 0),
        }


def may_sample(model: str) -> bool:
    """Whether a model's checkpoint might sample by itself. Reads the defaults of one in a directory, without torch.

    Args:
        model: a directory, or a hub id, whose files need not be here.
    """
    directory = user_path(model)
    for name in ("generation_config.json", "config.json"):
        with contextlib.suppress(FileNotFoundError):
            path = directory / name
            return _do_sample(path, path.stat().st_mtime_ns)
    return True


@functools.lru_cache(maxsize=16)
def _do_sample(path: Path, _changed: int) -> bool:
    """`do_sample` in a file; true if it cannot be read."""
    try:
        return bool(msgspec.json.decode(path.read_bytes(), type=dict[str, Any]).get("do_sample"))
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
        return True


#: Of OpenAI's API.
OPENAI_DEFAULTS = Sampling(temperature=1.0, top_p=1.0, top_k=0)
