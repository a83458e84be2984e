"""Finds equal rows, so that they travel once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def distinct(keys: Iterable[Hashable | None]) -> tuple[list[int], list[int]]:
    """Finds equal rows by their keys.

    Args:
        keys: one for each row; None for a row that need not travel.

    Returns:
        The indices of the rows that travel, ascending: the first row of each key. And for each row the index, in
        this list, of the row that it equals; -1 for a row without a key.
    """
    seen: dict[Hashable, int] = {}
    sent: list[int] = []
    copies: list[int] = []
    for row, key in enumerate(keys):
        if key is None:
            copies.append(-1)
            continue
        if key not in seen:
            seen[key] = len(sent)
            sent.append(row)
        copies.append(seen[key])
    return sent, copies
