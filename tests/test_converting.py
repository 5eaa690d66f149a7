"""The paper's data sets, generated in the layouts of their organisers, become raw data that nnU-Net plans."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Workspace, largest_file
from dicom_files import AXIAL, write_series
from PIL import Image

from nnunetv2_macl import converting
from nnunetv2_macl.converting import RawCase, convert
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import read_json
from nnunetv2_macl.preprocessing.sources import group_channels

FLIPPED = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
SHAPE = (10, 40, 36)


def label_map(values, shape=SHAPE):
    """Return a label map of boxes in the order of ``values`` along the second axis."""
    array = np.zeros(shape, dtype=np.int32)
    for number, value in enumerate(values):
        array[2:-2, 4 * number + 2 : 4 * number + 6, 6:-6] = value
    return array


def write(file, array, pixels=np.int16, direction=None, spacing=(0.8, 0.8, 2.0)):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(pixels))
    image.SetSpacing(spacing)
    image.SetOrigin((10, -20, 30))
    if direction:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(file))


def image_of(labels, seed):
    return 100 + labels + np.random.default_rng(seed).normal(0, 20, labels.shape)


def mmwhs(folder):
    labels = label_map([500, 600, 420, 550, 205, 820, 850])
    for number in range(1001, 1006):
        odd = number == 1003
        direction = FLIPPED if odd else None
        values = np.where((labels == 420) & (np.arange(SHAPE[2]) > 20), 421, labels) if odd else labels
        stem = folder / "ct_train" / f"ct_train_{number}"
        write(stem.with_name(f"{stem.name}_image.nii.gz"), image_of(labels, number), direction=direction)
        # Some tools write label maps as float.
        write(stem.with_name(f"{stem.name}_label.nii.gz"), values, np.float32 if odd else np.uint16, direction)
    write(folder / "ct_test" / "ct_test_2001_image.nii.gz", image_of(labels, 1))
    write(folder / "mr_train" / "mr_train_1001_image.nii.gz", image_of(labels, 2))


def hvsmr(folder):
    labels = label_map([1, 2])
    for number in range(5):
        write(folder / "Training dataset" / f"training_axial_full_pat{number}.nii.gz", image_of(labels * 100, number))
        write(folder / "Ground truth" / f"training_axial_full_pat{number}-label.nii.gz", labels, np.uint8)
    write(folder / "Test dataset" / "testing_axial_full_pat10.nii.gz", image_of(labels, 9))


def imagechd(folder):
    labels = label_map(range(1, 8))
    for number in range(1001, 1006):
        write(folder / f"ct_{number}_image.nii.gz", image_of(labels * 50, number))
        write(folder / f"ct_{number}_label.nii.gz", labels, np.uint8)


def chaos(folder):
    labels = label_map([60, 126, 189, 252])
    rows = np.arange(SHAPE[0])
    for patient in (1, 2, 5, 8, 13):
        place = folder / "Train_Sets" / "MR" / str(patient)
        for sequence, images in (("T2SPIR", ""), ("T1DUAL", "InPhase"), ("T1DUAL", "OutPhase")):
            volume = image_of(labels, patient)
            volume[:, 0, 0] = 1000 + rows  # which slice this is
            # Each slice of CHAOS has its own series UID.
            for number in rows:
                dicom = place / sequence / "DICOM_anon" / images
                write_series(
                    dicom, volume[number : number + 1], f"9.{patient}.{number}", f"{patient}", "", positions=[-6.0 * number],
                    start=int(number), image_uid=f"9.{patient}.{sequence}.{number}", orientation=AXIAL,
                )  # fmt: skip
            ground = place / sequence / "Ground"
            ground.mkdir(exist_ok=True)
            for number in rows:
                Image.fromarray(labels[number].astype(np.uint8)).save(ground / f"IMG-0004-{number + 1:05d}.png")
    for place in ("T2SPIR/DICOM_anon", "T1DUAL/DICOM_anon/OutPhase", "T1DUAL/DICOM_anon/InPhase"):
        write_series(folder / "Test_Sets" / "MR" / "3" / place, volume, "8.3")


def isic2018(folder):
    for number, size in enumerate([(60, 40), (80, 64), (64, 64), (40, 60), (72, 50)]):
        lesion = np.zeros(size[::-1], dtype=np.uint8)
        lesion[10:30, 10:30] = 255
        pixels = np.clip(
            np.random.default_rng(number).normal(150, 20, (*size[::-1], 3)) - lesion[..., None] // 4, 0, 255
        )
        images = folder / "ISIC2018_Task1-2_Training_Input"
        masks = folder / "ISIC2018_Task1_Training_GroundTruth"
        for place in (images, masks):
            place.mkdir(parents=True, exist_ok=True)
            (place / "LICENSE.txt").write_text("CC-0")
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"ISIC_{number:07d}.jpg")
        Image.fromarray(lesion).save(masks / f"ISIC_{number:07d}_segmentation.png")


LAYOUTS = {"mmwhs": mmwhs, "hvsmr": hvsmr, "imagechd": imagechd, "chaos": chaos, "isic2018": isic2018}


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nnUNet_raw"))
    return tmp_path / "nnUNet_raw"


def array(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_mmwhs(tmp_path, raw):
    mmwhs(tmp_path / "data")
    folder = convert(converting.mmwhs(tmp_path / "data"), "31")
    assert folder == raw / "Dataset031_MMWHSCT"
    description = read_json(folder / "dataset.json", "")
    assert description["channel_names"] == {"0": "CT"} and description["numTraining"] == 5
    assert description["labels"]["left atrium"] == 3 and description["labels"]["pulmonary artery"] == 7
    assert sorted(group_channels(folder / "imagesTr", ".nii.gz")) == [f"ct_{n}" for n in range(1001, 1006)]
    assert sorted(group_channels(folder / "imagesTs", ".nii.gz")) == ["ct_2001"]
    for number in (1001, 1003):
        assert np.array_equal(array(folder / "labelsTr" / f"ct_{number}.nii.gz"), label_map(range(1, 8)))
    label, image = (
        sitk.ReadImage(str(folder / place)) for place in ("labelsTr/ct_1003.nii.gz", "imagesTr/ct_1003_0000.nii.gz")
    )
    assert label.GetDirection() == image.GetDirection() == FLIPPED and label.GetOrigin() == image.GetOrigin()

    with pytest.raises(UserError, match="complete data set"):
        convert(converting.mmwhs(tmp_path / "data"), "31")
    with pytest.raises(UserError, match=r"mr_train_1001_image\.nii\.gz with"):
        converting.mmwhs(tmp_path / "data", "mr")


def test_a_conversion_that_was_stopped_continues(tmp_path, raw):
    mmwhs(tmp_path / "data")
    bad = tmp_path / "data" / "ct_train" / "ct_train_1002_label.nii.gz"
    write(bad, label_map([500, 777]))
    with pytest.raises(UserError, match=r"1002_label.*777"):
        convert(converting.mmwhs(tmp_path / "data"), "31")
    first = raw / "Dataset031_MMWHSCT" / "labelsTr" / "ct_1001.nii.gz"
    when = first.stat().st_mtime_ns
    write(bad, label_map([500]))
    folder = convert(converting.mmwhs(tmp_path / "data"), "31")
    assert first.stat().st_mtime_ns == when and len(list((folder / "labelsTr").iterdir())) == 5
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "imagesTr", "imagesTs", "labelsTr"]


def test_images_that_a_full_disk_cut_short_are_not_kept(tmp_path, raw):
    """ITK's writer of NIfTI raises no error on a full disk."""
    hvsmr(tmp_path / "data")
    for file in (tmp_path / "data" / "Training dataset").iterdir():
        sitk.WriteImage(sitk.ReadImage(str(file)), str(file.with_suffix("")))  # as .nii, so that it is converted
        file.unlink()
    image = r"Dataset032_HVSMR/imagesTr/pat0_0000\.nii\.gz could not be written: the disk is full"
    with largest_file(8192), pytest.raises(UserError, match=image):
        convert(converting.hvsmr(tmp_path / "data"), "32")
    folder = raw / "Dataset032_HVSMR"
    assert not list((folder / "imagesTr").iterdir()) and not (folder / "dataset.json").exists()
    convert(converting.hvsmr(tmp_path / "data"), "32")
    there = tmp_path / "data" / "Training dataset" / "training_axial_full_pat0.nii"
    assert np.array_equal(array(folder / "imagesTr" / "pat0_0000.nii.gz"), array(there))


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])
    return file.name


@pytest.mark.parametrize("kind", ["image", "label"])
def test_volumes_that_were_cut_short_are_refused(tmp_path, raw, kind):
    mmwhs(tmp_path / "data")
    name = cut(tmp_path / "data" / "ct_train" / f"ct_train_1001_{kind}.nii.gz")
    with pytest.raises(UserError, match=rf"{name} cannot be read: .*\. Unpack it again"):
        convert(converting.mmwhs(tmp_path / "data"), "31")
    assert not [file for file in raw.rglob("*.nii.gz") if "1001_0000" in file.name]


@pytest.mark.parametrize("kind", ["Input/ISIC_0000000.jpg", "GroundTruth/ISIC_0000000_segmentation.png"])
def test_photographs_and_masks_that_were_cut_short_are_refused(tmp_path, raw, kind):
    isic2018(tmp_path / "data")
    (file,) = (path for path in (tmp_path / "data").rglob("*") if str(path).endswith(kind))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{file.name} cannot be read: .*\. Unpack it again"):
        convert(converting.isic2018(tmp_path / "data"), "38")


def test_a_conversion_does_not_continue_another_one(tmp_path, raw):
    isic2018(tmp_path / "data")
    stopped = converting.isic2018(tmp_path / "data")
    stopped.cases.append(RawCase("ISIC_stop", "imagesTr", lambda target: (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(UserError, match="Stopped"):
        convert(stopped, "38")
    folder = raw / "Dataset038_ISIC2018"
    with pytest.raises(UserError, match=r"unfinished .*\"G\".*grey"):
        convert(converting.isic2018(tmp_path / "data", grey=True), "38")
    (folder / "imagesTr" / "other_0000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"imagesTr/other_0000\.png"):
        convert(converting.isic2018(tmp_path / "data"), "38")
    (folder / "imagesTr" / "other_0000.png").unlink()
    convert(converting.isic2018(tmp_path / "data"), "38")
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "imagesTr", "labelsTr"]

    (raw / "Dataset039_Mine" / "imagesTr").mkdir(parents=True)
    (raw / "Dataset039_Mine" / "imagesTr" / "ISIC_0000001_0000.png").write_bytes(b"")
    with pytest.raises(UserError, match="not of this conversion"):
        convert(converting.isic2018(tmp_path / "data"), "39")


def test_hvsmr_and_imagechd(tmp_path, raw):
    hvsmr(tmp_path / "hvsmr")
    folder = convert(converting.hvsmr(tmp_path / "hvsmr"), "32")
    assert read_json(folder / "dataset.json", "")["labels"] == {"background": 0, "myocardium": 1, "blood pool": 2}
    assert np.array_equal(array(folder / "labelsTr" / "pat3.nii.gz"), label_map([1, 2]))
    assert sorted(group_channels(folder / "imagesTs", ".nii.gz")) == ["pat10"]

    imagechd(tmp_path / "imagechd")
    folder = convert(converting.imagechd(tmp_path / "imagechd"), "33")
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "imagesUn"]
    assert len(group_channels(folder / "imagesUn", ".nii.gz")) == 5
    assert read_json(folder / "dataset.json", "")["numTraining"] == 0
    folder = convert(converting.imagechd(tmp_path / "imagechd", labelled=True), "34")
    assert np.array_equal(array(folder / "labelsTr" / "ct_1002.nii.gz"), label_map(range(1, 8)))
    write(tmp_path / "imagechd" / "ct_1005_label.nii.gz", label_map([1])[:5], np.uint8)
    with pytest.raises(UserError, match="has the size"):
        convert(converting.imagechd(tmp_path / "imagechd", labelled=True), "35")


def test_chaos(tmp_path, raw):
    chaos(tmp_path / "data")
    folder = convert(converting.chaos(tmp_path / "data", ["t2spir", "t1out"]), "36")
    cases = sorted(group_channels(folder / "imagesTr", ".nii.gz"))
    assert len(cases) == 10 and cases[:2] == ["mr01_t1out", "mr01_t2spir"]
    assert sorted(group_channels(folder / "imagesTs", ".nii.gz")) == ["mr03_t1out", "mr03_t2spir"]
    for case in cases[:2]:
        image, label = array(folder / "imagesTr" / f"{case}_0000.nii.gz"), array(folder / "labelsTr" / f"{case}.nii.gz")
        slices = image[:, 0, 0] - 1000
        # The files are ordered from head to feet, and the volume from feet to head.
        assert slices.tolist() == list(range(SHAPE[0]))[::-1]
        assert np.array_equal(label, label_map(range(1, 5))[slices])
    mask = tmp_path / "data" / "Train_Sets" / "MR" / "2" / "T2SPIR" / "Ground" / "IMG-0004-00003.png"
    Image.fromarray(np.full(SHAPE[1:], 90, dtype=np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"IMG-0004-00003.*90"):
        convert(converting.chaos(tmp_path / "data"), "37")
    mask.unlink()
    with pytest.raises(UserError, match="10 slices in DICOM_anon and 9 masks"):
        converting.chaos(tmp_path / "data")


@pytest.mark.parametrize("grey", [False, True])
def test_isic(tmp_path, raw, grey):
    isic2018(tmp_path / "data")
    folder = convert(converting.isic2018(tmp_path / "data", grey), "38")
    channels = {"0": "grey"} if grey else {"0": "R", "1": "G", "2": "B"}
    assert read_json(folder / "dataset.json", "")["channel_names"] == channels
    with Image.open(folder / "imagesTr" / "ISIC_0000001_0000.png") as image:
        assert image.size == (80, 64) and image.mode == ("L" if grey else "RGB")
    with Image.open(folder / "labelsTr" / "ISIC_0000001.png") as mask:
        labels = np.array(mask)
    assert labels[10:30, 10:30].all() and labels.sum() == 400
    (tmp_path / "data" / "ISIC2018_Task1_Training_GroundTruth" / "ISIC_0000003_segmentation.png").unlink()
    with pytest.raises(UserError, match=r"ISIC_0000003\.jpg has no label"):
        converting.isic2018(tmp_path / "data")


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_is_explained(tmp_path, name):
    (tmp_path / "something.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"should hold .* with .*; it holds something.zip"):
        getattr(converting, name)(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        getattr(converting, name)(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("hvsmr", []),
        ("mmwhs", []),
        ("chaos", ["--sequences", "t2spir", "t1in"]),
        ("isic2018", []),
        ("isic2018", ["--grey"]),
        ("imagechd", ["--labelled"]),
    ],
)
def test_nnunet_plans_what_is_converted(tmp_path, name, options):
    LAYOUTS[name](tmp_path / "data")
    space = Workspace(tmp_path / "nnunet")
    assert "labelled" in space.run("nnUNetv2_macl_convert", name, tmp_path / "data", "-d", "31", *options)
    quick = name == "hvsmr"
    how = "--no_pp" if quick else "--verify_dataset_integrity"
    space.run("nnUNetv2_plan_and_preprocess", "-d", "31", how, "-c", "2d", "-npfp", "2", "-np", "1")
    (plan,) = space.preprocessed.glob("*/nnUNetPlans.json")
    assert "2d" in json.loads(plan.read_text())["configurations"]
    if not quick:
        assert len(list(plan.parent.glob("nnUNetPlans_2d/*_seg.b2nd"))) == (10 if name == "chaos" else 5)
