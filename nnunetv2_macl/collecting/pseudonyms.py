"""Pseudonyms of patients. The same key gives a patient the same pseudonym. Without the key, it identifies nobody."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import shlex
import stat
from pathlib import Path

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import write_error

KEY_FILE = "pseudonym.key"
# Name of the first channel of a case with a pseudonym, without its ending
IMAGE_NAME = re.compile(r"p[0-9a-f]{12}_s[0-9a-f]{8}_0000")
FINGERPRINT_LENGTH = 16
_KEY_BYTES = 32


class Pseudonyms:
    """Names derived from a secret key by HMAC-SHA256.

    Attributes:
        fingerprint: Identifies the key without revealing it.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.fingerprint = self._digest("fingerprint", "")[:FINGERPRINT_LENGTH]

    def _digest(self, kind: str, text: str) -> str:
        return hmac.new(self._key, f"{kind}\0{text}".encode(errors="surrogateescape"), hashlib.sha256).hexdigest()

    def patient(self, identity: str) -> str:
        """Return the pseudonym of a patient, such as ``p0123456789ab``."""
        return f"p{self._digest('patient', identity)[:12]}"

    def case(self, patient: str, scan: str) -> str:
        """Return the name of a case: the pseudonym of the patient, ``_s``, and eight digits for the scan."""
        return f"{self.patient(patient)}_s{self._digest('scan', scan)[:8]}"


def load_key(folder: Path) -> Pseudonyms:
    """Load the key from a folder that only its owner may read. Make the folder and the key if they do not exist.

    Raises:
        UserError: Others may read the key, it is damaged, or it cannot be read or written.
    """
    file = folder / KEY_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="ascii") as stream:
                stream.write(f"{secrets.token_hex(_KEY_BYTES)}\n")
        text = file.read_text(encoding="ascii", errors="replace").strip()
        others = stat.S_IMODE(file.stat().st_mode) & 0o077
    except OSError as error:
        raise write_error(error, file) from error
    if os.name == "posix" and others:
        raise UserError(
            f"{file} is the key of the pseudonyms, and other users may read it. Type: chmod 600 "
            f"{shlex.quote(str(file))}"
        )
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise UserError(
            f"{file} is not a key: it should hold {2 * _KEY_BYTES} hexadecimal digits. Restore the key of the earlier "
            "images, or give another folder: --private_folder FOLDER"
        )
    return Pseudonyms(key)
