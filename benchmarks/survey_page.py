"""`docs/models.md`: what a survey found, as tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "models.md"

#: What a page calls each verdict, the best first.
_VERDICTS = {
    "packed": "yes",
    "one at a time": "one at a time",
    "refused": "no",
    "not built": "not tried",
    "wrong": "WRONG",
    "error": "FAILS",
    "hang": "HANGS",
}

_HEADINGS = {
    "causal": "Language models",
    "image_text": "Models that see images",
}

#: Longest reason in a table, in characters.
_REASON = 150

_ROW = re.compile(
    r"^\| (?P<type>[\w.-]+) \| (?P<verdict>[^|]*?)(?: with --layers (?P<layers>\S+))? \| (?P<at_once>[^|]*) "
    r"\| (?P<said>.*) \|$",
    re.MULTILINE,
)
_VERSION = re.compile(r"models in transformers (\d\S*)\. ")

#: What a page says of requests at once, by whether they were tried and the tokens are the same.
_AT_ONCE = {True: "same", False: "–"}

_INTRODUCTION = """\
# Which types of models run

`python -m benchmarks.survey --write` makes this page; do not edit it. With `--only TYPES` it tries these alone, and
keeps what the page has of others.

It has every type of causal and of image-text models in transformers {transformers}. A tiny random model of each (8
layers of width 32, of all kinds that the type has) was saved as safetensors and run through a broker, a worker and
a device, cut after 2 layers and before the last 2. Compared with the unsplit model were 20 tokens decoded greedily,
a left-padded pair, three beams, prompt lookup, logits, prompts longer than windows and chunks, and batches of up to
8 rows; for image-text types, with texts. Where "at once" says "same", so were requests that a `Generator` ran at
the same time: of several lengths, sampled, beginning alike, and with drafted tokens. There "–" means not tried.

A real checkpoint may differ from its type's default configuration, on which these models are based:
`lambda-split doctor --model` says what holds for a checkpoint.

| | Meaning |
| --- | --- |
| yes | the same tokens, many sessions in one forward of a worker |
| one at a time | the same tokens, a forward for each session; the reason follows |
| no | refused with this reason, before anything is computed |
| not tried | transformers cannot make or run a small one here |
"""


def page(found: Mapping[str, Any]) -> str:
    """The page of a survey's results, as `survey` or `results` returns them."""
    parts = [_INTRODUCTION.format(transformers=found["transformers"]), _counts(found)]
    for kind, heading in _HEADINGS.items():
        rows = "\n".join(_row(name, outcome) for name, outcome in sorted(found[kind].items()))
        parts.append(f"## {heading}\n\n| Type | Runs | At once | |\n| --- | --- | --- | --- |\n{rows}\n")
    return "\n".join(parts)


def results(text: str) -> dict[str, Any]:
    """What a page says, as `page` takes it: `said` is its text on a type, instead of `reason` and `refused`."""
    names = {said: verdict for verdict, said in _VERDICTS.items()}
    version = _VERSION.search(text)
    found: dict[str, Any] = {"transformers": version[1] if version else ""}
    for kind, heading in _HEADINGS.items():
        section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        found[kind] = {
            row["type"]: {
                "verdict": names[row["verdict"]],
                "layers": row["layers"] or "",
                "at_once": row["at_once"] == _AT_ONCE[True],
                "said": row["said"].strip(),
            }
            for row in _ROW.finditer(section)
            if row["verdict"] in names
        }
    return found


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Results of which those of single types are replaced by new ones."""
    return {**old, **{kind: {**old[kind], **new[kind]} for kind in _HEADINGS}}


def summary(found: Mapping[str, Any]) -> str:
    """The counts of a survey, and what is wrong, for a terminal."""
    lines = []
    for kind, heading in _HEADINGS.items():
        counts = ", ".join(f"{verdict} {count}" for verdict, count in _ordered(counted(found[kind])))
        lines.append(f"{heading}: {counts or 'none'}")
        for name, outcome in found[kind].items():
            if outcome["verdict"] in ("wrong", "error", "hang"):
                lines.append(f"  {name}: {outcome['verdict']}: {outcome['reason']}")
    return "\n".join(lines)


def _ordered(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    return ((verdict, counts[verdict]) for verdict in _VERDICTS if verdict in counts)


def counted(outcomes: Mapping[str, Any]) -> dict[str, int]:
    """How many types have each verdict."""
    return dict(Counter(outcome["verdict"] for outcome in outcomes.values()))


def _counts(found: Mapping[str, Any]) -> str:
    counts = {kind: counted(found[kind]) for kind in _HEADINGS}
    seen = [verdict for verdict in _VERDICTS if any(verdict in counts[kind] for kind in _HEADINGS)]
    lines = [
        f"| | types | {' | '.join(_VERDICTS[verdict] for verdict in seen)} |",
        "| --- " * (len(seen) + 2) + "|",
    ]
    for kind, heading in _HEADINGS.items():
        numbers = [str(counts[kind].get(verdict, 0)) for verdict in seen]
        lines.append(f"| {heading} | {len(found[kind])} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def _row(name: str, outcome: Mapping[str, Any]) -> str:
    runs = _VERDICTS[outcome["verdict"]] + (f" with --layers {outcome['layers']}" if outcome["layers"] else "")
    if (said := outcome.get("said")) is None:
        parts = [outcome["reason"]] if outcome["reason"] else []
        if outcome["verdict"] in ("packed", "one at a time"):
            parts += [f"refused: {feature} ({reason})" for feature, reason in outcome["refused"].items()]
        said = _escaped("; ".join(map(_short, parts)))
    return f"| {name} | {runs} | {_AT_ONCE[outcome['at_once']]} | {said} |"


def _short(text: str) -> str:
    return text if len(text) <= _REASON else f"{text[:_REASON].rstrip()} …"


def _escaped(text: str) -> str:
    """Plain text in a table's cell."""
    return text.replace("`", "").replace("|", "/").replace("<", "&lt;").replace("*", r"\*").replace("[", r"\[")
