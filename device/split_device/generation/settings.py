"""How the next token is chosen, and the bounds of a request's numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from split_common.errors import ConfigError
from split_common.system.files import user_path
from split_common.system.text import check_text
from split_device.speculation.names import check_speculate

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
    "min_p": Bounds(0, 1),
    "frequency_penalty": Bounds(-2, 2),
    "presence_penalty": Bounds(-2, 2),
    # transformers divides by it.
    "repetition_penalty": Bounds(0.01, 100),
    "logit_bias": Bounds(-100, 100),
    "min_tokens": Bounds(0, 2**63 - 1, True),
    "stop_token_ids": Bounds(0, 2**63 - 1, True),
    "prompt_logprobs": Bounds(0, 20, True),
    "seed": Bounds(-(2**63), SEED_BOUND - 1, True),
    "priority": Bounds(-(2**31), 2**31 - 1, True),
    "steps": Bounds(1, 1000, True),
    "guidance": Bounds(0, 1000),
    "strength": Bounds(0, 1),
}


def check_prompt_logprobs(tokens: int, most: int) -> None:
    """Raises ConfigError for more log probabilities of prompts than `MAX_PROMPT_LOGPROBS`.

    Args:
        tokens: number of tokens of which they are asked.
        most: how many others are told with each.
    """
    if (count := tokens * (most + 1)) > MAX_PROMPT_LOGPROBS:
        raise ConfigError(
            f"{count:,} log probabilities of prompts are more than {MAX_PROMPT_LOGPROBS:,}: ask for fewer at each "
            "token, or for fewer prompts and answers"
        )


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


#: Fields of `Sampling` by which every token is chosen, and of which a checkpoint may have defaults.
_CHOSEN = ("temperature", "top_p", "top_k")

#: Further settings, which are shown where they are set.
_ADJUSTED = ("min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")

#: Numbers among the fields of `Sampling`.
_NUMBERS = ("max_tokens", *_CHOSEN, "seed", *_ADJUSTED, "min_tokens")

#: Fields that are stored also where they are None, as they always were.
_STORED = (*_CHOSEN, "seed")

#: Most entries of a `logit_bias`, `bad_words`, `stop_token_ids` and stop strings: each costs time at every token.
MAX_ENTRIES = 1024

#: Most characters of all `bad_words` together: the tokens of each are looked at when a request begins.
MAX_BAD_WORDS = 64 * 1024

#: Most characters of all stop strings together: what may be the beginning of one is compared at every token.
MAX_STOP = 64 * 1024

#: Most log probabilities that are told of the prompts of one request: each takes some 600 bytes until it is sent.
MAX_PROMPT_LOGPROBS = 2**19

#: A token id that no vocabulary has: the end token of a text that goes on after all of the model's.
NO_END = 2**62


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation, by the names of vLLM and OpenAI; greedy if the temperature or top_p is 0.

    A temperature, top_p or top_k of None is left open: `filled` and `resolved` take it from elsewhere. Other fields
    of None are as the checkpoint has them in its generation_config, else without effect. An object holds only those
    of the fields after `seed` that are set, and so is stored without the others, as older versions stored it.
    """

    max_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    #: Least probability of a token, as a share of the likeliest one's.
    min_p: float | None = None
    #: How much a token is less likely for each time that the answer has it, and for being in it at all: both are
    #: subtracted from its logit.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    #: Divides positive logits of tokens that prompt or answer have, and multiplies negative ones.
    repetition_penalty: float | None = None
    #: What is added to the logits of tokens, by their ids.
    logit_bias: dict[int, float] | None = None
    #: Number of tokens before which no end token comes.
    min_tokens: int | None = None
    #: Further tokens that end the answer.
    stop_token_ids: tuple[int, ...] | None = None
    #: Whether the answer goes on after the model's end tokens.
    ignore_eos: bool | None = None
    #: Texts that the answer does not contain as tokens.
    bad_words: tuple[str, ...] | None = None
    #: What drafts the answer's tokens: one of `SPECULATE`. It changes no token.
    speculate: str | None = None

    def __post_init__(self) -> None:
        # msgspec writes what an object has of its own; the class has the defaults.
        for name, value in [*vars(self).items()]:
            if value is None and name not in _STORED:
                vars(self).pop(name)

    def checked(self) -> Sampling:
        """A copy whose values are within their bounds. Raises ConfigError."""
        copy: Sampling = checked(self, _NUMBERS)
        if self.logit_bias is not None:
            copy = dataclasses.replace(copy, logit_bias=check_bias(self.logit_bias))
        if self.stop_token_ids is not None:
            ids = _entries("stop_token_ids", self.stop_token_ids)
            ids = tuple(within_bounds("stop_token_ids", token) for token in ids)
            copy = dataclasses.replace(copy, stop_token_ids=ids or None)
        if self.bad_words is not None:
            words = _entries("bad_words", self.bad_words)
            if (length := sum(len(word) for word in words if isinstance(word, str))) > MAX_BAD_WORDS:
                raise ConfigError(f"bad_words have {length:,} characters: at most {MAX_BAD_WORDS:,} are taken")
            for word in words:
                if not isinstance(word, str) or not word:
                    raise ConfigError(f"invalid bad_words {word!r}: expected texts that are not empty")
                check_text(word, "bad_words")
            copy = dataclasses.replace(copy, bad_words=words or None)
        if self.speculate is not None:
            check_speculate(self.speculate)
        if self.ignore_eos is not None:
            if not isinstance(self.ignore_eos, bool):
                raise ConfigError(f"invalid ignore_eos {self.ignore_eos!r}: expected true or false")
            copy = dataclasses.replace(copy, ignore_eos=self.ignore_eos or None)
        if (copy.min_tokens or 0) > copy.max_tokens:
            raise ConfigError(f"min_tokens {copy.min_tokens} is more than max_tokens {copy.max_tokens}")
        return copy

    def filled(self, defaults: Sampling) -> Sampling:
        """A copy that takes from `defaults` what it leaves open of how tokens are chosen."""
        missing = [name for name in (*_CHOSEN, *_ADJUSTED) if getattr(self, name) is None]
        return dataclasses.replace(self, **{name: getattr(defaults, name) for name in missing})

    def resolved(self, config: Any) -> Sampling:
        """A copy that has a temperature, top_p and top_k: where it has none, those of a checkpoint.

        The checkpoint's are read as transformers reads them. If it does not sample (`do_sample`), nor does this,
        unless a top_p, top_k or min_p was asked for, which has an effect on sampling alone.

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
        """Whether a top_p, top_k or min_p is set that has an effect on sampling alone."""
        return (self.top_p is not None and 0 < self.top_p < 1) or (self.top_k or 0) > 0 or (self.min_p or 0) > 0

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one, whatever the checkpoint's defaults."""
        return (self.temperature is not None and self.temperature < GREEDY_TEMPERATURE) or self.top_p == 0

    def facts(self) -> dict[str, Any]:
        """The temperature, top_p and top_k, and further numbers of how tokens are chosen if set, by their names."""
        adjusted = {name: value for name in _ADJUSTED if (value := getattr(self, name)) is not None}
        return {name: getattr(self, name) for name in _CHOSEN} | adjusted

    def __str__(self) -> str:
        shown = self.facts()
        if self.greedy:
            shown = {name: value for name, value in shown.items() if name.endswith("penalty")}
        values = [f"{name} {value:g}" for name, value in shown.items() if value is not None]
        return ", ".join(["greedy (temperature 0)"] * self.greedy + values)

    def ends(self, end_tokens: Iterable[int]) -> list[int]:
        """The tokens that end a text, at least one, of a model that ends it with `end_tokens`."""
        own = () if self.ignore_eos else end_tokens
        return sorted({*own, *(self.stop_token_ids or ())}) or [NO_END]

    def options(self, bad_words: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        """Arguments of `generate`, of settings that are `resolved`, without frequency and presence penalties.

        They replace the checkpoint's own sampling settings, and its forms of output.

        Args:
            bad_words: the token ids of `bad_words`.
        """
        options: dict[str, Any] = dict(_TOKENS_ALONE)
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.logit_bias:
            options["sequence_bias"] = {(token,): bias for token, bias in self.logit_bias.items()}
        if self.min_tokens is not None:
            options["min_new_tokens"] = self.min_tokens
        if bad_words:
            options["bad_words_ids"] = [list(word) for word in bad_words]
        if self.greedy:
            return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.min_p is not None:
            options["min_p"] = self.min_p
        return options | {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(0, self.top_k or 0),
        }


def _entries(name: str, given: Any) -> tuple[Any, ...]:
    """A list of a request as a tuple. Raises ConfigError if it is not one, or is too long."""
    if not isinstance(given, list | tuple | set | frozenset):
        raise ConfigError(f"invalid {name} {given!r}: expected a list")
    if len(given) > MAX_ENTRIES:
        raise ConfigError(f"{name} has {len(given)} entries: at most {MAX_ENTRIES} are taken")
    return tuple(given)


def check_stop(texts: Sequence[str], name: str = "stop") -> tuple[str, ...]:
    """Texts at which an answer ends. Raises ConfigError for more than `MAX_ENTRIES`, or `MAX_STOP` characters."""
    found = _entries(name, tuple(texts))
    if (length := sum(map(len, found))) > MAX_STOP:
        raise ConfigError(f"{name} has {length:,} characters: at most {MAX_STOP:,} are taken")
    return found


def check_bias(given: Any) -> dict[int, float] | None:
    """Biases of tokens by their ids, which may be texts, as in JSON. Raises ConfigError."""
    if not isinstance(given, dict):
        raise ConfigError(f"invalid logit_bias {given!r}: expected an object of token ids and biases")
    _entries("logit_bias", list(given))
    found = {}
    for token, bias in given.items():
        if not re.fullmatch("[0-9]{1,18}", str(token), re.ASCII):
            raise ConfigError(f"invalid logit_bias: {token!r} is not a token id")
        found[int(token)] = within_bounds("logit_bias", bias)
    return found or None


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
