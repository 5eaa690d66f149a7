"""Folds: too few labelled cases for nnU-Net's five folds, and the user's own folds."""

import json
import subprocess

import pytest
import torch

from nnunetv2_macl import doctor
from nnunetv2_macl.doctor.dataset import folds
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.folds import check_fold, number_of_folds, splits_file, too_few_cases
from nnunetv2_macl.training.commands import command_to_fine_tune
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL


def leave(target, cases):
    """Keep that many of the five labelled cases."""
    for file in sorted(target.cases_folder.glob("case_*")):
        if int(file.name[5:8]) >= cases:
            file.unlink()


def trainer(target, fold):
    plans = target.plans_manager.plans | {"continue_training": False}
    return nnUNetTrainerMACL(plans, target.name, fold, target.dataset_json, torch.device("cpu"))


def test_five_cases_are_enough(target):
    assert number_of_folds(target) == 5 and folds(target, "cpu").status == doctor.OK
    assert command_to_fine_tune(target) == "nnUNetv2_train 901 2d 0 -tr nnUNetTrainerMACL"
    assert [len(cases) for cases in trainer(target, 0).do_split()] == [4, 1]


def test_with_fewer_than_five_cases_the_commands_that_work_are_shown(target):
    leave(target, 3)
    assert number_of_folds(target) == 0
    result = folds(target, "cpu")
    assert result.status == doctor.PROBLEM and "3 labelled cases" in result.message
    command, own_folds = result.fix.splitlines()
    assert command == "nnUNetv2_train 901 2d all -tr nnUNetTrainerMACL -device cpu"
    with pytest.raises(UserError, match=r"3 labelled cases(.|\n)*nnUNetv2_train 901 2d all -tr nnUNetTrainerMACL"):
        trainer(target, 0).do_split()
    assert len(trainer(target, "all").do_split()[1]) == 3
    with pytest.raises(UserError, match="Fold 1 cannot be made"):
        check_fold(target, 1)
    # Type the other way that is shown.
    subprocess.run(["sh", "-c", own_folds], check=True)
    assert number_of_folds(target) == 1 and folds(target, "cpu").status == doctor.OK
    assert [len(cases) for cases in trainer(target, 0).do_split()] == [2, 1]
    assert command_to_fine_tune(target) == "nnUNetv2_train 901 2d 0 -tr nnUNetTrainerMACL"


def test_a_single_case_has_no_folds(target):
    leave(target, 1)
    assert "echo" not in too_few_cases(target) and folds(target, "cpu").fix.startswith("nnUNetv2_train 901 2d all")


def test_a_file_of_splits_with_a_mistake_is_explained(target):
    for content, words in (
        ("[", "cannot be read"),
        ([], "must hold a list of folds"),
        ({"train": [], "val": []}, "must hold a list of folds"),
        ([{"train": ["case_000"]}], "'val' of fold 0 must be a list"),
        ([{"train": "case_000", "val": []}], "'train' of fold 0 must be a list"),
        ([{"train": ["case_000"], "val": []}], "'val' of fold 0 must be a list"),  # nnU-Net's training would fail
        ([{"train": [0], "val": []}], "'train' of fold 0 must be a list"),
        ([{"train": ["case_000"], "val": ["case_00l"]}], "names the case 'case_00l' in fold 0"),
        ([["case_000"]], "'train' of fold 0"),
    ):
        splits_file(target).write_text(content if isinstance(content, str) else json.dumps(content))
        result = folds(target, "cpu")
        assert (
            result.status == doctor.PROBLEM and words in result.message and str(splits_file(target)) in result.message
        )
        with pytest.raises(UserError, match=words):
            check_fold(target, 0)
