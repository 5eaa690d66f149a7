"""The table of the images that were collected or left out, with reasons. It is private: it identifies patients."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nnunetv2_macl.collecting.pseudonyms import FINGERPRINT_LENGTH
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, write_error

TAKEN = "yes"
LEFT_OUT = "no"


@dataclass(frozen=True)
class Row:
    """A DICOM series, a NIfTI file or another file."""

    taken: str  # ``yes`` or ``no``
    reason: str = ""  # Why it was left out, or a remark on an image that was taken
    image: str = ""  # File name of the image that was made
    patient: str = ""  # Pseudonym of the patient
    kind: str = ""  # ``DICOM``, ``NIfTI`` or ``other``
    modality: str = ""  # DICOM modality
    description: str = ""  # Series description and protocol name
    files: int = 1  # Number of files
    source: str = ""  # Path of the (first) file
    series: str = ""  # Series Instance UID
    content: str = ""  # What the image was made from: SHA-256 of the image UIDs of a series, or size and time of a file
    voxels: str = ""  # SHA-256 of the voxels and their geometry, by which duplicates are found
    key: str = ""  # Fingerprint of the key of the pseudonyms


_COLUMNS = [column.name for column in fields(Row)]
_FILES = _COLUMNS.index("files")


def read_table(file: Path) -> list[Row]:
    """Return the rows of a table, or none if the file does not exist.

    A last line that a killed run has cut short is ignored.

    Raises:
        UserError: Another program has changed the columns or damaged a line.
    """
    if not file.is_file():
        return []
    # utf-8-sig, because spreadsheets write a byte order mark
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    lines = csv.reader(io.StringIO(text, newline=""))
    columns = next(lines, _COLUMNS)
    if columns != _COLUMNS:
        raise UserError(
            f"{file} has the columns {','.join(columns)}, and should have {','.join(_COLUMNS)}. Correct the first line, "
            "or save the table with these columns, separated by commas."
        )
    rows = [(lines.line_num, line) for line in lines if line]
    if rows and not text.endswith("\n") and not _is_whole(rows[-1][1]):
        rows.pop()
    for number, line in rows:
        if not _is_whole(line):
            raise UserError(f"{file} has a damaged line, number {number}: {','.join(line)}. Correct the line.")
    values: list[dict[str, Any]] = [dict(zip(_COLUMNS, line, strict=True)) for _, line in rows]
    return [Row(**each | {"files": int(each["files"])}) for each in values]


def _is_whole(line: list[str]) -> bool:
    """Return whether a line has all its columns. The last one, the fingerprint of a key, has a fixed length."""
    return len(line) == len(_COLUMNS) and line[_FILES].isdecimal() and len(line[-1]) in (0, FINGERPRINT_LENGTH)


def append_row(row: Row, file: Path) -> None:
    """Append a row to a table, so that a killed run loses no row. Raise UserError if that fails."""
    try:
        new = not file.exists()
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(descriptor, "a", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            stream.write(_as_csv([row], header=new))
    except OSError as error:
        raise write_error(error, file) from error


def write_table(rows: Iterable[Row], file: Path) -> None:
    """Write a whole table. Images that were taken come first. Raise UserError if that fails."""
    ordered = sorted(rows, key=lambda row: (row.taken != TAKEN, row.image, row.source))
    text = _as_csv(ordered, header=True).encode(errors="surrogateescape")
    atomic_write(file, lambda stream: stream.write(text), private=True)


def _as_csv(rows: Iterable[Row], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        values = asdict(row)
        # A spreadsheet would compute a text that begins like a formula.
        description = values["description"]
        values["description"] = f"'{description}" if description[:1] in tuple("=+-@") else description
        writer.writerow(values)
    return text.getvalue()
