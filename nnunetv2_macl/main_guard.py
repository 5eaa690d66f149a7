"""Refuse a user's script that would run again in each process that it starts."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from nnunetv2_macl.errors import UserError

_Condition = ast.If | ast.IfExp | ast.BoolOp
_CONDITIONS = (ast.If, ast.IfExp, ast.BoolOp)


def require_main_guard() -> None:
    """Raise UserError if the running script calls this package outside of ``if __name__ == "__main__":``.

    A spawned process imports the script again. Without the guard, it would run the call again.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file == "<stdin>":  # the attribute makes spawned processes look for a file of this name
        del main.__file__
        return
    # consoles and notebooks have no file, and a spawned process does not import the __main__.py of a package
    if file is None or (getattr(main, "__spec__", None) is not None and Path(file).name == "__main__.py"):
        return
    try:
        script = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):  # the main file of a packed program is not a script
        return
    guards = [node for node in ast.walk(script) if isinstance(node, _CONDITIONS) and _names_its_module(node)]
    line = _line_at_work(vars(main))
    if any(line is None or guard.lineno <= line <= (guard.end_lineno or line) for guard in guards):
        return
    raise UserError(
        f"{file} would run again in each of the processes that are started now, because these import the script. Put the lines "
        'that call this package below the line: if __name__ == "__main__":'
    )


def _names_its_module(condition: _Condition) -> bool:
    test = condition if isinstance(condition, ast.BoolOp) else condition.test
    compared = [name for node in ast.walk(test) if isinstance(node, ast.Compare) for name in ast.walk(node)]
    return any(isinstance(name, ast.Name) and name.id == "__name__" for name in compared)


def _line_at_work(variables: dict[str, Any]) -> int | None:
    """Return the line of a script that its top level has reached, or None in a thread that the script started.

    Args:
        variables: The global variables of the script.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals is variables:
            return frame.f_lineno
        frame = frame.f_back
    return None
