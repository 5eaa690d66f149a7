"""Unlabelled images are preprocessed once with the same result as nnU-Net's, and every bad image is named."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import DATASET

from nnunetv2_macl.cli.pretrain import _pretrain_parser
from nnunetv2_macl.data import MASK_ENDING
from nnunetv2_macl.doctor.dataset import images
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.preprocessing import cases as preprocessing_of_cases
from nnunetv2_macl.preprocessing.cases import preprocess_unlabelled, unlabelled_folder
from nnunetv2_macl.preprocessing.sources import (
    CaseFiles,
    drop_second_names,
    find_sources,
    identities_of,
    training_cases,
)
from nnunetv2_macl.run import pretrain
from nnunetv2_macl.synthetic import generate_dataset


@pytest.fixture(autouse=True)
def nothing_done_yet(workspace):
    shutil.rmtree(workspace.preprocessed / DATASET / "nnUNetPlans_macl_2d")


def load():
    return DatasetConfiguration.load("901", "nnUNetPlans", "2d")


def run(configuration=None, datasets=(), **options):
    return preprocess_unlabelled(configuration or load(), datasets, processes=1, **options)


def test_the_same_numbers_as_nnunet(workspace):
    raw = workspace.raw / DATASET
    for file in (raw / "imagesUn").iterdir():
        file.unlink()
    shutil.copy(raw / "imagesTr" / "case_000_0000.nii.gz", raw / "imagesUn" / "again_0000.nii.gz")
    shutil.rmtree(raw / "labelsTr")  # never opened
    (case,) = run().cases
    ours = blosc2.open(case.file)[:]
    theirs = blosc2.open(str(load().cases_folder / "case_000.b2nd"))[:]
    np.testing.assert_array_equal(ours, theirs)


def test_unlabelled_images_with_the_name_of_a_labelled_case_are_named(workspace, caplog):
    raw = workspace.raw / DATASET / "imagesUn"
    first, second, *others = sorted(raw.iterdir())
    first.rename(raw / "case_000_0000.nii.gz")
    # macOS writes such files on disks of other systems
    second.rename(raw / "._case_007_0000.nii.gz")
    cases = run().cases
    assert [case.name for case in cases] == [file.name.removesuffix("_0000.nii.gz") for file in others]
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "1 unlabelled image" in warning and "case_000" in warning


def test_cases_are_made_again_only_after_a_change(workspace):
    configuration = load()
    cases = run(configuration).cases
    assert len(cases) == 4
    written = {case.name: os.stat(case.file).st_mtime_ns for case in cases}

    def made_again(configuration=None):
        nonlocal written
        now = {case.name: os.stat(case.file).st_mtime_ns for case in run(configuration).cases}
        changed = {name for name in now if now[name] != written.get(name)}
        written = now
        return changed

    assert made_again() == set()
    image = workspace.raw / DATASET / "imagesUn" / "case_006_0000.nii.gz"
    generate_dataset(workspace.folder / "other" / DATASET, labelled=1, unlabelled=0, test=0, shape=(8, 40, 48), seed=9)
    shutil.copyfile(workspace.folder / "other" / DATASET / "imagesTr" / "case_000_0000.nii.gz", image)
    assert made_again() == {"case_006"}
    folder = unlabelled_folder(configuration) / DATASET
    with open(folder / "case_007.b2nd", "r+b") as stream:
        stream.truncate(100)  # cut short
    (folder / "case_008.json").unlink()  # stopped before it was done
    os.utime(folder / "case_008.b2nd")
    assert made_again() == {"case_007", "case_008"}
    plans = configuration.folder / "nnUNetPlans.json"
    content = json.loads(plans.read_text())
    of_2d, intensities = content["configurations"]["2d"], content["foreground_intensity_properties_per_channel"]["0"]

    def after(change):
        change()
        plans.write_text(json.dumps(content))
        return made_again(load())

    # A few more labelled cases change these values, which only CT normalisation uses.
    assert after(lambda: intensities.update(mean=intensities["mean"] + 1)) == set()
    every = {"case_005", "case_006", "case_007", "case_008"}
    assert after(lambda: of_2d.update(normalization_schemes=["CTNormalization"])) == every
    assert after(lambda: intensities.update(mean=intensities["mean"] + 1)) == every
    assert after(lambda: of_2d.update(spacing=[2.0, 2.0])) == every


def test_other_data_sets(workspace):
    other = workspace.raw / "Dataset902_Other"
    generate_dataset(other, labelled=2, unlabelled=1, test=1, shape=(6, 30, 30), seed=5)
    shutil.rmtree(other / "labelsTr")
    sources = find_sources(load(), ["Dataset902_Other"])
    assert [(s.dataset_name, len(s.cases)) for s in sources] == [(DATASET, 4), ("Dataset902_Other", 3)]
    assert len(run(datasets=["Dataset902_Other"]).cases) == 7

    description = json.loads((other / "dataset.json").read_text())
    description["channel_names"] = {"0": "CT"}
    (other / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"\['MR0'\].*\['CT'\].*--channel_map MR0=CT"):
        find_sources(load(), ["Dataset902_Other"])
    assert len(find_sources(load(), ["Dataset902_Other"], {"MR0": "CT"})) == 2
    two_channels = replace(load(), dataset_json={"channel_names": {"0": "MR0", "1": "T2"}, "file_ending": ".nii.gz"})
    with pytest.raises(UserError, match=r"\['CT'\]\. Leave Dataset902_Other out of -u\.$"):
        find_sources(two_channels, ["Dataset902_Other"])  # no map can give two channels
    with pytest.raises(UserError, match="no channel 'PET'"):
        find_sources(load(), ["Dataset902_Other"], {"PET": "CT"})
    (other / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json does not exist"):
        find_sources(load(), ["Dataset902_Other"])
    with pytest.raises(UserError, match="Dataset903_Gone does not exist"):
        find_sources(load(), ["Dataset903_Gone"])


def test_channels_are_matched_by_name(workspace):
    """The other data set has two channels. The second one is ours, and one case lacks it."""
    other = workspace.raw / "Dataset904_Two"
    generate_dataset(other, labelled=1, unlabelled=2, test=0, shape=(6, 40, 48), channels=2, seed=5)
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"channel_names": {"0": "PET", "1": "MR0"}}))
    (other / "imagesUn" / "case_002_0001.nii.gz").unlink()
    shutil.copy(other / "imagesTr" / "case_000_0001.nii.gz", workspace.raw / DATASET / "imagesUn" / "same_0000.nii.gz")
    with pytest.raises(UserError, match=r"Case case_002 lacks channel MR0 \(_0001\)"):
        run(datasets=["Dataset904_Two"])
    done = run(datasets=["Dataset904_Two"], skip_unreadable=True)
    assert [target.name for target in done.skipped] == ["case_002"]
    same, theirs = (blosc2.open(next(c.file for c in done.cases if c.file.endswith(end)))[:] for end in
                    ("same.b2nd", "Two/case_000.b2nd"))  # fmt: skip
    np.testing.assert_array_equal(same, theirs)


def test_a_channel_is_not_taken_for_another_that_is_missing(workspace):
    """Each case has one file of two: the first channel, the second channel, or five points in time."""
    other = workspace.raw / "Dataset904_Two"
    generate_dataset(other, labelled=0, unlabelled=2, test=0, shape=(6, 40, 48), channels=2, seed=5)
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"channel_names": {"0": "PET", "1": "MR0"}}))
    folder = other / "imagesUn"
    kept = workspace.folder / "kept"
    shutil.copytree(folder, kept)
    for file in folder.glob("*_0001.nii.gz"):
        file.unlink()
    with pytest.raises(UserError, match=r"_0000\.nii\.gz holds 1 channel\(s\); its data set has 2"):
        run(datasets=["Dataset904_Two"])
    image = sitk.ReadImage(str(kept / "case_000_0001.nii.gz"))
    sitk.WriteImage(sitk.JoinSeries([image] * 5), str(folder / "case_000_0000.nii.gz"))
    with pytest.raises(UserError, match=r"case_000_0000\.nii\.gz holds 5 channel\(s\); its data set has 2"):
        run(datasets=["Dataset904_Two"])
    for name in ("case_000", "case_001"):
        (folder / f"{name}_0000.nii.gz").unlink()
        shutil.copy(kept / f"{name}_0000.nii.gz", folder / f"{name}_0001.nii.gz")
    (other / "dataset.json").write_text(json.dumps(description | {"channel_names": {"0": "MR0", "1": "PET"}}))
    with pytest.raises(UserError, match=r"case_000 lacks channel MR0 \(_0000\)"):
        run(datasets=["Dataset904_Two"])


def test_one_map_of_channels_serves_several_data_sets(workspace):
    """One of the data sets has another name for the channel, and the other one has DATASET's name."""
    for name, channel in (("Dataset905_Same", "MR0"), ("Dataset906_Other", "T1")):
        generate_dataset(workspace.raw / name, labelled=1, unlabelled=1, test=0, shape=(6, 40, 48), seed=5)
        file = workspace.raw / name / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"channel_names": {"0": channel}}))
    sources = find_sources(load(), ["Dataset905_Same", "Dataset906_Other"], {"MR0": "T1"})
    assert [len(source.cases) for source in sources[1:]] == [2, 2]


def test_a_single_file_may_hold_the_first_channel_alone(workspace):
    """Most cases of the other data set lack the second channel, which is not needed."""
    other = workspace.raw / "Dataset904_Two"
    generate_dataset(other, labelled=0, unlabelled=3, test=0, shape=(6, 40, 48), channels=2, seed=5)
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"channel_names": {"0": "MR0", "1": "PET"}}))
    for case in ("case_000", "case_001"):
        (other / "imagesUn" / f"{case}_0001.nii.gz").unlink()
    (other / "imagesUn" / "case_002_0001.nii.gz").unlink()
    os.symlink("/nowhere", other / "imagesUn" / "case_002_0001.nii.gz")
    assert len(run(datasets=["Dataset904_Two"]).cases) == 7


def test_cases_that_share_a_file_are_different_cases(workspace):
    """Some cases lack a channel and have a link to one empty image instead. A link to a labelled image is not used."""
    files = {case: [f"/{case}", "/empty"] for case in ("a", "b", "c")} | {"second_name_of_a": ["/a", "/empty"]}
    cases = {case: CaseFiles(paths, None, 1, [], [(0, hash(path)) for path in paths]) for case, paths in files.items()}
    assert list(drop_second_names(cases, set(), set())) == ["a", "b", "c"]
    assert list(drop_second_names(cases, {(0, hash("/a"))}, set())) == ["b", "c"]
    for name in ("p", "q", "empty"):
        (workspace.folder / name).touch()
    own, shared = (os.stat(workspace.folder / name) for name in ("p", "empty"))
    labelled = [[str(workspace.folder / name), str(workspace.folder / "empty")] for name in ("p", "q")]
    found = identities_of([*labelled, labelled[0]])
    assert (own.st_dev, own.st_ino) in found and (shared.st_dev, shared.st_ino) not in found


@pytest.mark.parametrize("place", ["own", "other"])
def test_images_on_a_disk_that_is_not_mounted_are_missed(workspace, place):
    other = workspace.raw / "Dataset902_Other"
    generate_dataset(other, labelled=2, unlabelled=1, test=0, shape=(6, 30, 30), seed=5)
    run(datasets=["Dataset902_Other"])
    folder = (other if place == "other" else workspace.raw / DATASET) / "imagesUn"
    folder.rename(workspace.folder / "disk")
    folder.symlink_to(workspace.folder / "not_mounted")
    with pytest.raises(UserError, match=f"{folder}.*does not exist. Mount it"):
        run(datasets=["Dataset902_Other"])
    if place == "own":  # the folder into which a disk would be mounted
        folder.unlink()
        folder.mkdir()
        with pytest.raises(UserError, match=f"{folder} is empty.*4 images"):
            run(datasets=["Dataset902_Other"])


def test_labelled_images_among_the_unlabelled_count_once(workspace, caplog):
    """Otherwise, validation images of an excluded fold could be used."""
    raw = workspace.raw / DATASET
    for file in (raw / "imagesTr").iterdir():
        shutil.copy(file, raw / "imagesUn")
    caplog.set_level("INFO")
    assert len(run().cases) == 4
    assert "case_000, case_001, case_002, ..." in caplog.text


@pytest.mark.slow
def test_the_plans_reader_reads_other_data_sets_too(workspace):
    """The reader decides the order of the axes."""
    file = load().folder / "nnUNetPlans.json"
    content = json.loads(file.read_text())
    run()
    file.write_text(json.dumps(content | {"image_reader_writer": "SimpleITKIOWithReorient"}))
    shutil.copytree(workspace.raw / DATASET, workspace.raw / "Dataset902_Other")
    sources = find_sources(load(), ["Dataset902_Other"])
    assert [source.reader.__name__ for source in sources] == ["SimpleITKIOWithReorient"] * 2
    made = {case.file: os.stat(case.file).st_mtime_ns for case in run(datasets=["Dataset902_Other"]).cases}
    file.write_text(json.dumps(content))
    again = {case.file: os.stat(case.file).st_mtime_ns for case in run(datasets=["Dataset902_Other"]).cases}
    assert len(again) == 13 and not set(made.values()) & set(again.values())


def test_a_damaged_image_does_not_hide_the_reader_of_the_others(workspace):
    other = workspace.raw / "Dataset902_Other"
    shutil.copytree(workspace.raw / DATASET, other)
    for folder in ("imagesTr", "imagesUn"):
        for file in (other / folder).iterdir():
            sitk.WriteImage(sitk.ReadImage(str(file)), str(file).replace(".nii.gz", ".nii"))
            file.unlink()
    description = other / "dataset.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"file_ending": ".nii"}))
    first = min((other / "imagesUn").iterdir())
    first.write_bytes(first.read_bytes()[:500])
    found = run(datasets=["Dataset902_Other"], skip_unreadable=True)
    assert [path.name for path in found.skipped] == [first.name.removesuffix("_0000.nii")]
    for folder in ("imagesTr", "imagesUn"):
        for file in (other / folder).iterdir():
            file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot be used.*--skip_unreadable"):
        run(datasets=["Dataset902_Other"])


def test_a_case_whose_mask_was_replaced_alone_is_made_again(workspace, monkeypatch):
    """A mask of another plan must not stay next to an image of the former plan."""
    plans = load().folder / "nnUNetPlans.json"
    content = json.loads(plans.read_text())
    of_2d = content["configurations"]["2d"]
    of_2d["use_mask_for_norm"], spacing = [True], of_2d["spacing"]
    plans.write_text(json.dumps(content))
    case = run().cases[0]
    of_2d["spacing"] = [2 * mm for mm in spacing]
    plans.write_text(json.dumps(content))

    def fail(*arguments):
        raise UserError("the disk is full")

    source = find_sources(load(), [])[0]
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing_of_cases, "_configuration", load(), raising=False)
        patch.setattr(preprocessing_of_cases, "_write_case", fail)
        with pytest.raises(UserError, match="full"):
            preprocessing_of_cases._preprocess_case(
                source.cases[case.name], source.reader, Path(case.file.removesuffix(".b2nd")), {}
            )
    of_2d["spacing"] = spacing
    plans.write_text(json.dumps(content))
    again = next(each for each in run().cases if each.name == case.name)
    image, mask = (blosc2.open(again.file.removesuffix(".b2nd") + ending)[:] for ending in (".b2nd", MASK_ENDING))
    assert image.shape[1:] == mask.shape[1:]


def test_a_list_of_images_needs_no_labels(workspace):
    other = workspace.raw / "Dataset902_Other"
    shutil.copytree(workspace.raw / DATASET / "imagesTr", other / "images")
    description = {"channel_names": {"0": "MR0"}, "file_ending": ".nii.gz", "labels": {"background": 0}}
    description["dataset"] = {"a": {"images": ["images/case_000_0000.nii.gz"]}}
    (other / "dataset.json").write_text(json.dumps(description))
    assert len(run(datasets=["Dataset902_Other"]).cases) == 5
    for listed in ([], {"c": 3}, {"c": {"label": "x"}}, {"c": {"images": "c_0000.nii.gz"}}, {"c": {"images": [0]}}):
        (other / "dataset.json").write_text(json.dumps(description | {"dataset": listed}))
        with pytest.raises(UserError, match=r"'dataset' must be an object .* a list of 'images'"):
            run(datasets=["Dataset902_Other"])


def test_a_plan_with_the_name_of_another_is_refused(workspace):
    folder = load().folder
    shutil.copy(folder / "nnUNetPlans.json", folder / "mine.json")
    with pytest.raises(UserError, match=r"has the plans_name 'nnUNetPlans'.*: \"mine\"$"):
        DatasetConfiguration.load("901", "mine", "2d")
    content = json.loads((folder / "nnUNetPlans.json").read_text())
    (folder / "nnUNetPlans.json").write_text(json.dumps(content | {"dataset_name": "Dataset900_Other"}))
    with pytest.raises(UserError, match=r"has the dataset_name 'Dataset900_Other'"):
        load()


def test_further_data_sets_add_up():
    assert _pretrain_parser().parse_args(["1", "-u", "28", "-u", "29", "30"]).unlabelled == ["28", "29", "30"]


def test_a_plan_of_another_number_of_channels_is_refused(workspace):
    file = load().folder / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"channel_names": {"0": "T1", "1": "T2"}}))
    with pytest.raises(
        UserError, match=r"plans 2d for 1 channels, .*dataset\.json names 2: T1, T2\..*mv .*Plans\.json"
    ):
        load()


def test_files_with_other_names_are_reported(workspace, caplog):
    folder = workspace.raw / DATASET / "imagesUn"
    for name in ("p9.nii.gz", "q1_0000.mha", "q4_000.nii.gz", ".DS_Store"):
        (folder / name).touch()
    pretrain("901", "2d", device="cpu", plan_only=True)
    assert "3 files of Dataset901_Generated" in caplog.text
    assert "imagesUn/p9.nii.gz, imagesUn/q1_0000.mha, imagesUn/q4_000.nii.gz" in caplog.text
    result = images(load(), 5, find_sources(load(), []))
    assert result.status == "note" and "3 files are not named" in result.message


def test_other_files_next_to_the_plan_are_ignored(workspace):
    folder = workspace.preprocessed / DATASET
    (folder / "nnUNetPlansGone.json").symlink_to(folder / "nowhere")
    (folder / "folder.json").mkdir()
    assert load().plans_name == "nnUNetPlans"
    with pytest.raises(UserError, match=r"-p nnUNetPlans\. Type"):
        DatasetConfiguration.load("901", "nnUNetPlansGone", "2d")


def test_naming_mistakes_are_explained(workspace):
    folder = workspace.raw / DATASET / "imagesUn"
    shutil.copy(folder / "case_005_0000.nii.gz", folder / "case_005_0001.nii.gz")
    with pytest.raises(UserError, match=r"Case case_005 has a file _0001.*--skip_unreadable"):
        run()
    assert [target.name for target in run(skip_unreadable=True).skipped] == ["case_005"]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "scan.dcm").touch()
    with pytest.raises(UserError, match=r"CASE_0000\.nii\.gz.*scan\.dcm"):
        find_sources(load(), [])


def test_too_little_space_is_reported_before_anything_is_written(workspace, monkeypatch):
    usage = shutil.disk_usage(workspace.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"may need up to .* GiB, and 0\.0 GiB are free"):
        run()
    assert not unlabelled_folder(load()).exists()


def test_without_nnunets_preprocessing_its_command_is_named(workspace):
    shutil.rmtree(load().cases_folder)
    with pytest.raises(UserError, match="nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans -c 2d"):
        training_cases(load())
