"""What `lambda-split doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    subject: str
    status: Status
    detail: str
