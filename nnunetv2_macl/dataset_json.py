"""Checks of dataset.json, nnU-Net's description of a data set, before it is used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_macl.errors import UserError

# Number of characters of a wrong value that a message shows.
_LONGEST_VALUE = 100


def channel_names(dataset_json: dict[str, Any]) -> list[str]:
    """Return the names of the channels in their order. ``modality`` is nnU-Net's older key."""
    names = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    return [str(names[key]) for key in sorted(names, key=int)]


def class_names(dataset_json: dict[str, Any]) -> dict[str, str]:
    """Return the names of the labels and regions, by their keys in nnU-Net's ``summary.json``."""
    labels = dataset_json["labels"].items()
    return {str(tuple(value) if isinstance(value, (list, tuple)) else value): name for name, value in labels}


def check_dataset_json(content: Any, file: Path, *, labels: bool = False) -> dict[str, Any]:
    """Return the content of a dataset.json, after a check of every key that this package uses.

    Args:
        content: Content of the file.
        file: The file, for the message.
        labels: Whether the labels are used, too. Images to pre-train on need no labels.

    Raises:
        UserError: A key is missing or has a wrong value. The message names the file, the key, the value and the rule.
    """
    if not isinstance(content, dict):
        _refuse(file, "its content", "an object with the keys channel_names, labels and file_ending", content)
    key = "modality" if "modality" in content and "channel_names" not in content else "channel_names"
    for required in (key, "file_ending", *(["labels"] if labels else [])):
        if required not in content:
            raise UserError(f"{file} has no '{required}'. Add it, as for any nnU-Net data set.")
    _check_channels(content[key], key, file)
    ending = content["file_ending"]
    if not (isinstance(ending, str) and re.fullmatch(r"(\.\w+)+", ending)):
        _refuse(file, "'file_ending'", 'a file ending, such as ".nii.gz"', ending)
    reader = content.get("overwrite_image_reader_writer", "")
    if not isinstance(reader, str):
        _refuse(file, "'overwrite_image_reader_writer'", 'the name of an nnU-Net reader, such as "SimpleITKIO"', reader)
    if "dataset" in content:
        _check_list(content["dataset"], file, labels)
    if labels:
        _check_labels(content, file)
    return content


def _check_channels(names: Any, key: str, file: Path) -> None:
    rule = "an object of channel names by channel number"
    if isinstance(names, dict) and names:
        numbers = [number for number in map(_number, names) if number is not None]
        if sorted(numbers) == list(range(len(names))):
            if wrong := [name for name in names.values() if not (isinstance(name, str) and name)]:
                _refuse(file, f"a name in '{key}'", 'a text, such as "MR"', wrong[0])
            return
        if len(set(numbers)) == len(names):
            rule += " from 0 on without a gap"
        elif all(_number(number) is not None for number in names.values()):  # names and numbers are swapped
            rule += f", here {json.dumps({str(number): name for name, number in names.items()})}"
    elif isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        rule += f", here {json.dumps({str(number): name for number, name in enumerate(names)})}"
    elif isinstance(names, str) and names:
        rule += f", here {json.dumps({'0': names})}"
    else:
        rule += ', such as {"0": "MR"}'
    _refuse(file, f"'{key}'", rule, names)


def _number(value: Any) -> int | None:
    """Return the channel number in a key, or None if the key is not a number."""
    try:
        return int(value) if isinstance(value, (str, int)) and not isinstance(value, bool) and int(value) >= 0 else None
    except ValueError:
        return None


def _check_list(listed: Any, file: Path, labels: bool) -> None:
    """Check the list of files that dataset.json may contain. It is nnU-Net's other way to name files."""
    keys = "a list of 'images'" + (" and a 'label'" if labels else "")
    if not isinstance(listed, dict):
        _refuse(file, "'dataset'", f"an object of cases, each with {keys}", listed)
    for case, entry in listed.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        good = isinstance(images, list) and images and all(isinstance(image, str) and image for image in images)
        if not good or (labels and not isinstance(entry.get("label"), str)):
            _refuse(file, f"case '{case}' in 'dataset'", f"an object with {keys}", entry)


def _check_labels(content: dict[str, Any], file: Path) -> None:
    rule = 'an object of label values by name, with "background": 0'
    labels = content["labels"]
    if not isinstance(labels, dict):
        _refuse(file, "'labels'", rule, labels)
    try:
        LabelManager(labels, content.get("regions_class_order"))
    except (AssertionError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        _refuse(file, "'labels'", f"{rule}, as nnU-Net takes it ({str(error).rstrip('. ')})", labels)


def _refuse(file: Path, what: str, rule: str, value: Any) -> NoReturn:
    got = json.dumps(value, ensure_ascii=False)
    got = got if len(got) <= _LONGEST_VALUE else f"{got[:_LONGEST_VALUE]}..."
    raise UserError(f"{file}: {what} must be {rule}, and is {got}. Correct the file.")
