"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RIGHT, WRONG, NOTE = "right", "wrong", "note"


@dataclass(frozen=True)
class Result:
    """Of one check.

    Args:
        check: its name, the same at every call.
        status: ``right``; ``wrong``, which something should be done about; or ``note``, which is neither.
        words: what was found, with values.
        mend: the commands that mend what is wrong, or what to type next; a line each.
        values: the numbers in ``words``, for programs.
    """

    check: str
    status: str
    words: str
    mend: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
