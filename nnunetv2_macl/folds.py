"""nnU-Net's folds: whether a data set has enough cases for them, and whether a user's own can be used."""

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

# what nnU-Net makes where there is no file of splits, and needs as many cases for
_FOLDS = 5
_FIX = "Correct it, or move it away to have nnU-Net make its own."


def splits_file(configuration: DatasetConfiguration) -> Path:
    """Return where nnU-Net keeps the folds of a data set, and where users put their own."""
    return configuration.folder / "splits_final.json"


def number_of_folds(configuration: DatasetConfiguration) -> int:
    """Return how many folds a data set has or nnU-Net will make of it; 0 where it has too few labelled cases.

    Raises:
        UserError: A file of splits that is not as nnU-Net has it, or no labelled case; names it.
    """
    if splits_file(configuration).is_file():
        return len(read_splits(configuration))
    return _FOLDS if len(_labelled_cases(configuration)) >= _FOLDS else 0


def check_fold(configuration: DatasetConfiguration, fold: int) -> None:
    """Check that nnU-Net can train a fold.

    Raises:
        UserError: Too few labelled cases for nnU-Net's folds, or a file of splits that is not as nnU-Net has it.
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
    """Return in words that nnU-Net cannot make its folds, and a file of splits that would do."""
    names = _labelled_cases(configuration)
    there = pluralise(len(names), "labelled case")
    words = f"{configuration.dataset_name} has {there}, and nnU-Net's {_FOLDS} folds need {_FOLDS}. Train on all cases"
    if len(names) < 2:
        return f"{words}."
    example = shlex.quote(json.dumps([{"train": names[1:], "val": names[:1]}]))
    file = shlex.quote(str(splits_file(configuration)))
    return f"{words}, or write folds of your own, for example one fold: echo {example} > {file}"


def read_splits(configuration: DatasetConfiguration) -> list[dict[str, list[str]]]:
    """Read nnU-Net's file of splits. Raises UserError where it is not as nnU-Net has it; names file, fold and key."""
    file = splits_file(configuration)
    splits: Any = read_json(file, _FIX)
    if not isinstance(splits, list) or not splits:
        raise UserError(f"{file} must hold a list of folds, and holds {json.dumps(splits)[:100]}. {_FIX}")
    for number, fold in enumerate(splits):
        for key in ("train", "val"):
            cases = fold.get(key) if isinstance(fold, dict) else None
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise UserError(
                    f"{file}: '{key}' of fold {number} must be a list of case names, and is {json.dumps(cases)[:100]}. {_FIX}"
                )
    return splits


def _labelled_cases(configuration: DatasetConfiguration) -> list[str]:
    """Return the names of the cases that nnU-Net splits, in whichever of its formats they are preprocessed."""
    folder = str(configuration.cases_folder)
    with contextlib.suppress(AssertionError, KeyError, FileNotFoundError):
        return sorted(infer_dataset_class(folder).get_identifiers(folder))
    return [case.name for case in training_cases(configuration)]  # says what is missing
