"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, PROBLEM, NOTE = "right", "wrong", "note"


@dataclass(frozen=True)
class Result:
    """What one check found."""

    check: str  # Name of the check
    status: str  # ``right``; ``wrong``, a problem to fix; or ``note``, for information
    message: str  # What was found, with values
    fix: str | None = None  # Commands that fix the problem, or the next command, one per line
    values: dict[str, Any] = field(default_factory=dict)  # The numbers in ``message``, for programs
