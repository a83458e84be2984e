"""The tree of errors at the top of their module is that of the classes."""

from __future__ import annotations

import re

from split_common import errors
from split_common.errors import Busy, SplitError


def tree(error: type[SplitError], depth: int = 0) -> list[tuple[int, str, int, bool]]:
    """Depth, name, exit code, and whether it is a ValueError too, in the order of the module."""
    here = (depth, error.__name__, error.exit_code, issubclass(error, ValueError))
    ours = [child for child in error.__subclasses__() if child.__module__ == errors.__name__]
    return [here, *(line for child in ours for line in tree(child, depth + 1))]


def test_the_tree_is_that_of_the_classes() -> None:
    assert errors.__doc__ is not None
    written = re.findall(r"^    ([│├└─ ]*)(\w+)(?: \((\d)\))?(, a ValueError too)?$", errors.__doc__, re.MULTILINE)
    found = [(len(rule) // 4, name, int(code or 1), bool(also)) for rule, name, code, also in written]
    assert found == tree(SplitError)


def test_an_error_may_say_when_to_try_again() -> None:
    assert SplitError("no").retry_after is None
    assert Busy("full").retry_after == 1.0
    assert Busy("full", 0.0).retry_after == 0.0
