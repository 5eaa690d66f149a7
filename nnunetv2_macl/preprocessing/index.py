"""The file ``.index`` of a folder lists what each preprocessed case was made from. A run need not open each record.

The index only saves time. Cases that it lacks, or that were written later, are looked up in their ``CASE.json``. Several
machines may therefore write to one folder, and the index that is written last is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write
from nnunetv2_macl.nnunet import read_json

# No case has a file with this name.
INDEX = ".index"
_ENDING = ".b2nd"
_FORMAT_VERSION = 2


class Index:
    """The cases in the folder of a source that were made by the plan with a given signature.

    Args:
        folder: Folder of the cases.
        signature: Signature of the plan.
        former: Signature of the same plan in earlier versions, whose cases are used too.
    """

    def __init__(self, folder: Path, signature: str, former: str | None = None) -> None:
        self.folder, self.signature, self.former = folder, signature, former
        self._entries: dict[str, Any] = {}
        with contextlib.suppress(UserError, AttributeError):
            content = read_json(folder / INDEX, "")
            ours = content.get("format_version") == _FORMAT_VERSION and content.get("plan") == signature
            if ours and isinstance(cases := content.get("cases"), dict):
                self._entries = cases
        self._changed = False
        self._there = self._list()

    def is_done(self, name: str, fingerprint: dict[str, Any]) -> bool:
        """Return whether the case exists, is complete, and was made from these files by this plan."""
        written = self._there.get(f"{name}{_ENDING}")
        if written is None:
            return False
        entry = [*written, fingerprint["files"], fingerprint["channels"], fingerprint["reader"]]
        if self._entries.get(name) == entry:
            return True
        try:
            record = read_json(self.folder / f"{name}.json", "")
            made_from = record["made_from"]
            if made_from["plan"] == self.former:
                made_from = made_from | {"plan": self.signature}
            done = made_from == fingerprint and record["bytes"] == written[0]
        except (UserError, KeyError, TypeError):
            return False
        if done:
            self._entries[name] = entry
            self._changed = True
        return done

    def refresh(self) -> None:
        """List the folder again, after cases were made."""
        self._there = self._list()

    def write(self) -> None:
        """Write the index if it has changed. A folder that may not be written gets no index."""
        if not self._changed:
            return
        content = {"format_version": _FORMAT_VERSION, "plan": self.signature, "cases": self._entries}
        # No indentation, because there may be hundreds of thousands of cases.
        text = json.dumps(content, ensure_ascii=False).encode()
        with contextlib.suppress(UserError):
            atomic_write(self.folder / INDEX, lambda stream: stream.write(text), needed=len(text))
        self._changed = False

    def _list(self) -> dict[str, list[int]]:
        """Return size and time of change of the file of every case. Links are not followed: others may change them."""
        try:
            with os.scandir(self.folder) as entries:
                found = {e.name: e.stat(follow_symlinks=False) for e in entries if e.name.endswith(_ENDING)}
        except FileNotFoundError:
            return {}
        except PermissionError as error:
            raise UserError(f"{self.folder} cannot be read: {error.strerror}. Check its permissions.") from None
        return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
