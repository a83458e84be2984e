"""Turns the text of a constraint into a grammar, in a process of its own: `python grammar_check.py < SOURCE`.

Some texts keep the compiler busy for minutes, or overflow its stack: only this process ends of it. It imports
nothing of lambda-split, so that it starts quickly.

stdin has a JSON object with `kind`, `text` and `seconds` of CPU time; stdout gets one with `grammar` or `error`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

#: Most bytes of memory that this process takes.
MAX_MEMORY = 2 * 1024**3

#: A keyword that cannot be enforced is an error.
STRICT: Any = {"lenient": False}

#: How JSON is written: between two of its parts may stand a space, or a line break and the indentation after it.
#: Models have learnt to write these, and without a bound some would write nothing else.
JSON_OPTIONS: Any = {**STRICT, "whitespace_pattern": r" |\n {0,20}"}

#: Keywords that were true or false in older drafts.
_NUMBERS = ("exclusiveMinimum", "exclusiveMaximum")

#: Keywords that change nothing at these values.
_NEUTRAL: dict[str, Any] = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True}

#: Keywords whose values are schemas by name, or values that are not schemas.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples", "required")


def cleaned(schema: Any) -> Any:
    """A schema without keywords at neutral values. Raises ValueError, which names the keyword, for wrong ones."""
    if isinstance(schema, list):
        return [cleaned(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NUMBERS and isinstance(value, bool):
            raise ValueError(f"{key}: expected a number, got {json.dumps(value)}")
        if key in _NEUTRAL and value is _NEUTRAL[key]:
            continue
        if key in _VALUES:
            result[key] = value
        elif key in _NAMED and isinstance(value, dict):
            result[key] = {name: cleaned(each) for name, each in value.items()}
        else:
            result[key] = cleaned(value)
    return result


def grammar_of(kind: str, text: str) -> str:
    """The grammar of a constraint. Raises ValueError, RecursionError: it is not one."""
    if kind == "json":
        schema = cleaned(json.loads(text))
        return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS))
    if kind == "choice":
        texts = dict.fromkeys(json.loads(text))
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(each) for each in texts)))
    return str(grammar_from("regex" if kind == "regex" else "grammar", text))


def problem(grammar: str) -> str:
    """Why a grammar cannot be used; empty if it can."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if matcher.is_error():
        return str(matcher.get_error())
    matcher.compute_bitmask()
    return "no text fits it" if matcher.is_error() else ""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.load(sys.stdin)
    # The signal's default action ends the process, also within the compiler.
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        grammar = grammar_of(request["kind"], request["text"])
        found = problem(grammar)
    except RecursionError:
        found = "it is nested too deeply"
    except Exception as error:
        found = str(error)
    json.dump({"error": found} if found else {"grammar": grammar}, sys.stdout)


if __name__ == "__main__":
    main()
