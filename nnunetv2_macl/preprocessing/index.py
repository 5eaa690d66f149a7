"""``.index`` of a folder of preprocessed cases: what each was made from, so that a start need not open any.

It only makes starts fast. What it lacks, and what was written since, is looked up in the case's own ``CASE.json``. So machines
that preprocess parts into one folder need not agree about it, and the last to write wins.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, remove_temporary
from nnunetv2_macl.nnunet import read_json

# no name of a case's file
INDEX = ".index"
_ENDING = ".b2nd"
_FORMAT_VERSION = 2
# longer than a case takes on any machine: another may be writing into the folder
_ABANDONED = 6 * 3600.0


class Index:
    """The cases in the folder of a source that are done by the plan of a signature."""

    def __init__(self, folder: Path, signature: str) -> None:
        self.folder, self.signature = folder, signature
        self._entries = self._read()
        self._changed = False
        self._there = self._list()

    def is_done(self, name: str, fingerprint: dict[str, Any]) -> bool:
        """Whether the case is there, whole, and made from these files by this plan."""
        written = self._there.get(f"{name}{_ENDING}")
        if written is None:
            return False
        entry = [*written, fingerprint["files"], fingerprint["channels"], fingerprint["reader"]]
        if self._entries.get(name) == entry:
            return True
        try:
            record = read_json(self.folder / f"{name}.json", "")
            done = record["made_from"] == fingerprint and record["bytes"] == written[0]
        except (UserError, KeyError, TypeError):
            return False
        if done:
            self._entries[name] = entry
            self._changed = True
        return done

    def remove_abandoned(self) -> None:
        """Remove what processes that were killed left in the folder."""
        remove_temporary(self.folder, older_than=_ABANDONED)

    def refresh(self) -> None:
        """After cases were made."""
        self._there = self._list()

    def write(self) -> None:
        """Write it where something has changed. A folder that others own goes without."""
        if not self._changed:
            return
        content = {"format_version": _FORMAT_VERSION, "plan": self.signature, "cases": self._entries}
        # hundreds of thousands of cases: no indentation
        text = json.dumps(content, ensure_ascii=False).encode()
        with contextlib.suppress(UserError):
            atomic_write(self.folder / INDEX, lambda stream: stream.write(text), needed=len(text))
        self._changed = False

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(UserError, AttributeError):
            content = read_json(self.folder / INDEX, "")
            ours = content.get("format_version") == _FORMAT_VERSION and content.get("plan") == self.signature
            if ours and isinstance(cases := content.get("cases"), dict):
                return cases
        return {}

    def _list(self) -> dict[str, list[int]]:
        """Size and time of the voxels of every case, in one pass. A link is no case: what it points to is not ours to trust."""
        try:
            with os.scandir(self.folder) as entries:
                found = {e.name: e.stat(follow_symlinks=False) for e in entries if e.name.endswith(_ENDING)}
        except FileNotFoundError:
            return {}
        except PermissionError as error:
            raise UserError(f"{self.folder} cannot be read: {error.strerror}. Check its permissions.") from None
        return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
