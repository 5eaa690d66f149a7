"""Ask nnU-Net for a trainer. This runs in another process, because nnU-Net imports every module in the folders.

``python -m nnunetv2_macl.doctor.finder NAME`` prints one line of JSON last: ``file`` and ``ours``, or ``error`` and ``file``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path


def find(name: str) -> dict[str, object]:
    """Return which class nnU-Net finds by the name of one of our trainers.

    Returns:
        ``file`` with the class, and whether the class is ``ours``; or ``error``, and the ``file`` that raised it, or None.
    """
    folders = [Path(p) for p in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if p.strip()]
    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        found = recursive_find_trainer_class_by_name(name)
    except BaseException as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename:
            frames.append(error.filename)
        theirs = [f for f in frames if any(Path(f).is_relative_to(folder) for folder in folders)]
        return {"error": f"{type(error).__name__}: {error}", "file": theirs[-1] if theirs else None}

    from nnunetv2_macl.training import finetune

    if found is getattr(finetune, name):
        return {"ours": True, "file": finetune.__file__}
    module = found.__module__
    # nnU-Net forgets the modules that it imported from these folders, so find the file by its name.
    candidates = [sys.modules[module].__file__] if module in sys.modules else []
    candidates += [str(folder / f"{module.replace('.', os.sep)}.py") for folder in folders]
    candidates += [str(folder / module.replace(".", os.sep) / "__init__.py") for folder in folders]
    return {"ours": False, "file": next((f for f in candidates if f and os.path.isfile(f)), module)}


if __name__ == "__main__":
    print("\n" + json.dumps(find(sys.argv[1])))
