"""dataset.json as users write it: what nnU-Net accepts is accepted, and everything else is explained in one sentence."""

import json
from pathlib import Path

import pytest
from conftest import DATASET

from nnunetv2_macl.compare.folders import RawImages
from nnunetv2_macl.dataset_json import channel_names, check_dataset_json
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.preprocessing.sources import find_sources

FILE = Path("Dataset900_There") / "dataset.json"
GOOD = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz", "labels": {"background": 0, "organ": 1}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_names": {"1": "T2", "0": "T1"}},
        {"channel_names": {"00": "T1", "01": "T2"}},
        {"file_ending": ".NII.GZ"},
        {"overwrite_image_reader_writer": "NibabelIO", "numTraining": "12", "name": 3},
        {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]},
        {"dataset": {"a": {"images": ["$HOME/a.nii.gz"], "label": "b.nii.gz"}}},
    ],
)
def test_content_that_nnunet_accepts_is_accepted(changes):
    assert channel_names(check_dataset_json(GOOD | changes, FILE, labels=True)) == ["T1", "T2"]


def test_the_older_key_and_no_labels():
    older = {"modality": {"0": "CT"}, "file_ending": ".nrrd"}
    assert channel_names(check_dataset_json(older, FILE)) == ["CT"]
    # Pre-training never uses labels.
    check_dataset_json(older | {"labels": {"0": "background", "1": "organ"}}, FILE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel_names": {"T1": 0, "T2": 1}}, ["channel_names", '{"0": "T1", "1": "T2"}', '{"T1": 0, "T2": 1}']),
        ({"channel_names": {"T1": "0"}}, ["channel_names", '{"0": "T1"}']),
        ({"channel_names": ["T1", "T2"]}, ["channel_names", '{"0": "T1", "1": "T2"}']),
        ({"channel_names": "T1"}, ["channel_names", '{"0": "T1"}']),
        *(({"channel_names": value}, ["channel_names", "an object"]) for value in ({}, [], "", None, 3, True, [["T1"]])),
        ({"channel_names": {"0": "T1", "00": "T2"}}, ["channel_names"]),
        ({"channel_names": {"-1": "T1"}}, ["channel_names"]),
        *(({"channel_names": value}, ["from 0 on without a gap"]) for value in ({"1": "T1", "2": "T2"}, {"0": "T1", "2": "T2"})),
        ({"channel_names": {"first": "T1"}}, ["channel_names"]),
        *(({"channel_names": {"0": value}}, ["channel_names", "a text"]) for value in (None, 1, ["T1"], {"a": 1}, "")),
        *(({"file_ending": value}, ["file_ending", ".nii.gz"]) for value in (None, "", ".", "nii.gz", 1, [".nii.gz"])),
        *(({"file_ending": value}, ["file_ending", ".nii.gz"]) for value in (".nii.gz ", "./nii.gz", ".*")),
        *(({"overwrite_image_reader_writer": value}, ["overwrite_image_reader_writer"]) for value in (None, 1, {})),
        *(({"labels": value}, ["labels", "background"]) for value in (None, [], "organ", {"organ": 1}, {"0": "background"})),
        ({"labels": {"background": 0, "organ": "one"}}, ["labels"]),
        ({"labels": {"background": 0, "organ": None}}, ["labels"]),
        ({"labels": {"background": 0, "whole": [1, 2]}}, ["labels", "regions_class_order"]),
        *(({"dataset": value}, ["dataset", "images"]) for value in (None, [], {"a": 1}, {"a": {"images": "a.nii.gz"}})),
        ({"dataset": {"a": {"images": ["a.nii.gz"]}}}, ["case 'a' in 'dataset'", "label"]),
    ],
)  # fmt: skip
def test_malformed_content_is_explained_in_one_sentence(changes, words):
    with pytest.raises(UserError) as error:
        check_dataset_json(GOOD | changes, FILE, labels=True)
    message = str(error.value)
    assert str(FILE) in message and "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("content", [[], "text", None, 3])
def test_content_that_is_no_object_is_refused(content):
    with pytest.raises(UserError, match=r"dataset\.json: its content must be an object"):
        check_dataset_json(content, FILE)


@pytest.mark.parametrize("key", GOOD)
def test_a_key_that_is_missing_is_named(key):
    with pytest.raises(UserError, match=f"has no '{key}'"):
        check_dataset_json({k: v for k, v in GOOD.items() if k != key}, FILE, labels=True)


def test_every_way_to_a_data_set_checks_it(workspace, target):
    """The ways are the planned data set, another one of -u, and the raw data set of a study."""
    other = workspace.raw / "Dataset902_Other"
    for file, read in (
        (
            workspace.preprocessed / DATASET / "dataset.json",
            lambda: DatasetConfiguration.load("901", "nnUNetPlans", "2d"),
        ),
        (other / "dataset.json", lambda: find_sources(target, ["Dataset902_Other"])),
        (workspace.raw / DATASET / "dataset.json", lambda: RawImages.find(DATASET)),
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(target.dataset_json | {"channel_names": {"MR0": 0}}))
        with pytest.raises(UserError, match=r"'channel_names' must be .* here \{\"0\": \"MR0\"\}") as error:
            read()
        assert str(file) in str(error.value)


@pytest.mark.parametrize("label", [None, 3, "labelsTr/case_000.nii.gz"])
def test_the_labels_of_listed_images_are_not_checked(workspace, target, label):
    (workspace.raw / DATASET).rename(workspace.raw / "Dataset902_Other")
    file = workspace.raw / "Dataset902_Other" / "dataset.json"
    listed = {"listed": {"images": ["imagesTr/case_000_0000.nii.gz"], "label": label}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset": listed}))
    (source,) = find_sources(target, ["Dataset902_Other"])
    assert "listed" in source.cases and not source.invalid_cases


def test_a_byte_order_mark_is_accepted(workspace, target):
    """Editors on Windows write it."""
    (workspace.raw / DATASET).rename(workspace.raw / "Dataset902_Other")
    file = workspace.raw / "Dataset902_Other" / "dataset.json"
    file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    (source,) = find_sources(target, ["Dataset902_Other"])
    assert len(source.cases) == 9
