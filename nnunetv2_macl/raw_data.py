"""nnU-Net raw data sets that this package writes into."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import why_not_a_name, write_json
from nnunetv2_macl.nnunet import folders_with_id

DESCRIPTION = "dataset.json"


def raw_data_set(name_or_id: str, new_name: str) -> Path:
    """Return the folder of a raw data set by id or name. A data set that does not exist gets the name ``new_name``.

    Raises:
        UserError: nnUNet_raw is not set, the name is not as nnU-Net needs it, or the number belongs to another data set in
            one of nnU-Net's folders.
    """
    root = os.environ.get("nnUNet_raw")
    if not root:
        raise UserError("nnUNet_raw is not set. Type:\n    export nnUNet_raw=/path/to/nnUNet_raw")
    if re.fullmatch("Dataset[0-9]{3}_.+", name_or_id) and name_or_id == os.path.basename(name_or_id):
        number = name_or_id[7:10]
    elif name_or_id.isdecimal() and 0 < int(name_or_id) < 1000:
        number = f"{int(name_or_id):03d}"
    else:
        raise UserError(f"-d must be a number from 1 to 999 or a name such as Dataset027_NAME, got '{name_or_id}'.")
    there = folders_with_id(number)
    names = {path.name for path in there}
    if not names and (why := why_not_a_name(name_or_id)):
        raise UserError(f"-d {name_or_id!r} cannot be the name of a folder on every system: {why}. Give another name.")
    if name_or_id in names or not names:
        return Path(root) / (f"Dataset{number}_{new_name}" if name_or_id.isdecimal() else name_or_id)
    folder = Path(root) / there[0].name
    if len(names) > 1 or not name_or_id.isdecimal() or not folder.is_dir():
        raise UserError(
            f"The number {number} belongs to {' and '.join(map(str, there))}. nnU-Net finds none of several data sets "
            "with the same number. Give another number, or the full name of the data set that you mean: -d"
        )
    return folder


def write_description(
    folder: Path, channels: list[str], labels: Mapping[str, int], cases: int, file_ending: str, **more: Any
) -> None:
    """Write the ``dataset.json`` of a raw data set with a number of labelled ``cases``.

    The channel names "CT" and "rgb_to_0_1" select nnU-Net's normalisation. ``labels`` maps names, including the
    background, to values.
    """
    description = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": cases,
        "file_ending": file_ending,
    }
    write_json(description | more, folder / DESCRIPTION)
