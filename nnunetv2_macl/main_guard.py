"""A user's own script that starts processes, which import it again."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from nnunetv2_macl.errors import UserError


def require_main_guard() -> None:
    """Raise UserError where the running script has no ``if __name__ == "__main__":``.

    A process that is spawned imports the script again. Without the guard, it would run the whole of the script again.
    """
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    # modules that are run by python -m come with a specification; consoles and notebooks have no file
    if file is None or getattr(main, "__spec__", None) is not None:
        return
    try:
        script = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):  # a program that is packed in another way
        return
    compared = [name for node in ast.walk(script) if isinstance(node, ast.Compare) for name in ast.walk(node)]
    if any(isinstance(name, ast.Name) and name.id == "__name__" for name in compared):
        return
    raise UserError(
        f"{file} would run again in each of the processes that are started now, because they import it. Put the lines "
        'that call this package below the line: if __name__ == "__main__":'
    )
