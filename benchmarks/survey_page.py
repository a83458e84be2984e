"""`docs/models.md`: what a survey found, as tables."""

from __future__ import annotations

import re
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

_ROW = re.compile(r"^\| (?P<type>[\w.-]+) \| (?P<verdict>[^|]*?)(?: with --layers \S+)? \|", re.MULTILINE)

_INTRODUCTION = """\
# Which types of models run

`python -m benchmarks.survey --write` makes this page; do not edit it. It has every type of causal and of
image-text models in transformers {transformers}. A tiny random model of each (8 layers of width 32, of all
kinds that the type has) was saved as safetensors and run through a broker, a worker and a device, cut after 2
layers and before the last 2. Compared with the unsplit model were 20 tokens decoded greedily, a left-padded
pair, three beams, prompt lookup, logits, prompts longer than windows and chunks, and batches of up to 8 rows;
for image-text types, with texts.

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
    """The page of a survey's results, as `survey` returns them."""
    parts = [_INTRODUCTION.format(transformers=found["transformers"]), _counts(found)]
    for kind, heading in _HEADINGS.items():
        rows = "\n".join(_row(name, outcome) for name, outcome in sorted(found[kind].items()))
        parts.append(f"## {heading}\n\n| Type | Runs | |\n| --- | --- | --- |\n{rows}\n")
    return "\n".join(parts)


def verdicts(text: str) -> dict[str, dict[str, str]]:
    """The verdict on each type that a page has, by its section's kind and the type's name."""
    names = {said: verdict for verdict, said in _VERDICTS.items()}
    sections = {
        kind: text.partition(f"## {heading}\n")[2].partition("\n## ")[0] for kind, heading in _HEADINGS.items()
    }
    return {
        kind: {row["type"]: names[row["verdict"]] for row in _ROW.finditer(section) if row["verdict"] in names}
        for kind, section in sections.items()
    }


def summary(found: Mapping[str, Any]) -> str:
    """The counts of a survey, and what is wrong, for a terminal."""
    lines = []
    for kind, heading in _HEADINGS.items():
        counts = ", ".join(f"{verdict} {count}" for verdict, count in _ordered(found["counts"][kind]))
        lines.append(f"{heading}: {counts or 'none'}")
        for name, outcome in found[kind].items():
            if outcome["verdict"] in ("wrong", "error", "hang"):
                lines.append(f"  {name}: {outcome['verdict']}: {outcome['reason']}")
    return "\n".join(lines)


def _ordered(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    return ((verdict, counts[verdict]) for verdict in _VERDICTS if verdict in counts)


def _counts(found: Mapping[str, Any]) -> str:
    seen = [verdict for verdict in _VERDICTS if any(verdict in found["counts"][kind] for kind in _HEADINGS)]
    lines = [
        f"| | types | {' | '.join(_VERDICTS[verdict] for verdict in seen)} |",
        "| --- " * (len(seen) + 2) + "|",
    ]
    for kind, heading in _HEADINGS.items():
        counts = [str(found["counts"][kind].get(verdict, 0)) for verdict in seen]
        lines.append(f"| {heading} | {len(found[kind])} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def _row(name: str, outcome: Mapping[str, Any]) -> str:
    runs = _VERDICTS[outcome["verdict"]] + (f" with --layers {outcome['layers']}" if outcome["layers"] else "")
    said = [outcome["reason"]] if outcome["reason"] else []
    if outcome["verdict"] in ("packed", "one at a time"):
        said += [f"refused: {feature} ({reason})" for feature, reason in outcome["refused"].items()]
    return f"| {name} | {runs} | {_escaped('; '.join(map(_short, said)))} |"


def _short(text: str) -> str:
    return text if len(text) <= _REASON else f"{text[:_REASON].rstrip()} …"


def _escaped(text: str) -> str:
    """Plain text in a table's cell."""
    return text.replace("`", "").replace("|", "/").replace("<", "&lt;").replace("*", r"\*").replace("[", r"\[")
