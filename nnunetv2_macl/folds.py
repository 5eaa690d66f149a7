"""Checks of nnU-Net's folds: are there enough cases, and can the user's own folds be used?"""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json
from nnunetv2_macl.preprocessing.sources import training_cases
from nnunetv2_macl.text import pluralise

# Without a file of splits, nnU-Net makes this many folds, and needs at least as many cases.
_FOLDS = 5
_FIX = "Correct the file, or move it away so that nnU-Net makes its own folds."


def splits_file(configuration: DatasetConfiguration) -> Path:
    """Return where nnU-Net keeps the folds of a data set, and where users put their own."""
    return configuration.folder / "splits_final.json"


def number_of_folds(configuration: DatasetConfiguration) -> int:
    """Return how many folds a data set has, or how many nnU-Net will make; 0 if there are too few labelled cases.

    Raises:
        UserError: The file of splits is not as nnU-Net needs it, or there is no labelled case.
    """
    if splits_file(configuration).is_file():
        return len(read_splits(configuration))
    return _FOLDS if len(_labelled_cases(configuration)) >= _FOLDS else 0


def check_fold(configuration: DatasetConfiguration, fold: int) -> None:
    """Check that nnU-Net can train a fold.

    Raises:
        UserError: There are too few labelled cases for nnU-Net's folds, or the file of splits is not as nnU-Net needs it.
    """
    if not number_of_folds(configuration):
        raise UserError(f"Fold {fold} cannot be made: {too_few_cases(configuration)}")
    if not splits_file(configuration).is_file() or fold >= len(splits := read_splits(configuration)):
        return  # nnU-Net makes one
    there = set(_labelled_cases(configuration))
    for case in (*splits[fold]["train"], *splits[fold]["val"]):
        if case not in there:
            raise UserError(
                f"{splits_file(configuration)} names the case {case!r} in fold {fold}, and nnU-Net has preprocessed no "
                f"such case in {configuration.cases_folder}. {_FIX}"
            )


def too_few_cases(configuration: DatasetConfiguration) -> str:
    """Return a message that nnU-Net cannot make its folds, with a command that writes folds."""
    names = _labelled_cases(configuration)
    there = pluralise(len(names), "labelled case")
    words = f"{configuration.dataset_name} has {there}, and nnU-Net's {_FOLDS} folds need {_FOLDS}. Train on all cases"
    if len(names) < 2:
        return f"{words}."
    example = shlex.quote(json.dumps([{"train": names[1:], "val": names[:1]}]))
    file = shlex.quote(str(splits_file(configuration)))
    return f"{words}, or write folds of your own, for example one fold: echo {example} > {file}"


def read_splits(configuration: DatasetConfiguration) -> list[dict[str, list[str]]]:
    """Read nnU-Net's file of splits. Raise UserError with the file, the fold and the key if it is not as nnU-Net needs it."""
    file = splits_file(configuration)
    splits: Any = read_json(file, _FIX)
    if not isinstance(splits, list) or not splits:
        raise UserError(f"{file} must hold a list of folds, and holds {json.dumps(splits)[:100]}. {_FIX}")
    for number, fold in enumerate(splits):
        for key in ("train", "val"):
            cases = fold.get(key) if isinstance(fold, dict) else None
            if not (isinstance(cases, list) and cases and all(isinstance(case, str) for case in cases)):
                raise UserError(
                    f"{file}: '{key}' of fold {number} must be a list of case names, and is {json.dumps(cases)[:100]}. {_FIX}"
                )
    return splits


def _labelled_cases(configuration: DatasetConfiguration) -> list[str]:
    """Return the names of the cases that nnU-Net splits, in any of its formats of preprocessed cases."""
    folder = str(configuration.cases_folder)
    with contextlib.suppress(AssertionError, KeyError, FileNotFoundError):
        return sorted(infer_dataset_class(folder).get_identifiers(folder))
    return [case.name for case in training_cases(configuration)]  # raises an error that says what is missing
