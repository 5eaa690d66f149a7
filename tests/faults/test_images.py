"""Odd and damaged image files are read correctly, or refused with the file and the reason."""

import gzip
import json
import os
import re
import shutil
import struct

import blosc2
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import DATASET, set_folders

from nnunetv2_macl.compare.folders import RawImages
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.preprocessing import cases
from nnunetv2_macl.preprocessing.sources import CaseFiles, find_sources, training_cases

SHAPE = (8, 40, 48)
GOOD = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
COLOURED = np.repeat(GOOD[..., None], 3, -1).astype(np.uint8)


def write(file, array=GOOD, *, spacing=(1.5, 1.5, 5.0), direction=None, vector=False):
    image = sitk.GetImageFromArray(array, isVector=vector)
    if not vector and array.ndim == 3:
        image.SetSpacing(spacing)
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel())
    sitk.WriteImage(image, str(file))


def nifti(file, array=GOOD, affine=None, **header):
    image = nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 5, 1]) if affine is None else affine, dtype=array.dtype)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, file)


def patched(file, offset, content):
    """Write an uncompressed NIfTI file, and change bytes of its header."""
    nifti(file)
    data = bytearray(file.read_bytes())
    data[offset : offset + len(content)] = content
    file.write_bytes(data)


def compressed(file, content):
    file.write_bytes(gzip.compress(content))


def plain_nifti(tmp):
    write(tmp / "plain.nii")
    return (tmp / "plain.nii").read_bytes()


def huge_nifti(tmp):
    patched(tmp / "huge.nii", DIMENSIONS, HUGE)
    return (tmp / "huge.nii").read_bytes()


def renamed(name, file):
    write(file.parent / name)
    (file.parent / name).rename(file)


def cut(file, share):
    write(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


TURNED = [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]
DIMENSIONS, SPACINGS = 40, 76  # bytes of dim and pixdim in a NIfTI header
HUGE = struct.pack("<8h", 3, 2048, 2048, 2048, 1, 1, 1, 1)

# name: (ending, function that writes the file, reason in the error, or None for a valid file)
FILES = {
    "good": (".nii.gz", write, None),
    "uncompressed": (".nii", write, None),
    "turned": (".nii.gz", lambda f: write(f, direction=TURNED), None),
    "flipped axes": (".nii.gz", lambda f: write(f, direction=np.diag([-1, -1, 1])), None),
    "one slice": (".nii.gz", lambda f: write(f, GOOD[:1]), None),
    "one column": (".nii.gz", lambda f: write(f, GOOD[:, :, :1]), "slices of another orientation"),
    "whole numbers": (".nii.gz", lambda f: write(f, GOOD.astype(np.int16)), None),
    "float64": (".nii.gz", lambda f: write(f, GOOD.astype(np.float64)), None),
    "great whole numbers": (".nii.gz", lambda f: nifti(f, (GOOD * 2**54).astype(np.int64)), "largest value is"),
    "scaled": (".nii.gz", lambda f: nifti(f, GOOD.astype(np.int16), scl_slope=2.0, scl_inter=-1.0), None),
    "4D": (".nii.gz", lambda f: nifti(f, np.stack([GOOD] * 3, -1)), "channels or time points"),
    "4D of one": (".nii.gz", lambda f: nifti(f, GOOD[..., None]), None),
    "5D": (".nii.gz", lambda f: nifti(f, np.stack([np.stack([GOOD] * 2, -1)] * 2, -1)), "cannot be used|dimensions|channels"),
    "RGB where grey is planned": (".nii.gz", lambda f: write(f, np.zeros((*SHAPE, 3), np.uint8), vector=True), "values"),
    "RGB, one slice": (".nii.gz", lambda f: write(f, COLOURED[:1], vector=True), "values"),
    "complex numbers": (".nii.gz", lambda f: nifti(f, GOOD.astype(np.complex64)), "complex|cannot be used"),
    "no voxels": (".nii", lambda f: patched(f, DIMENSIONS, struct.pack("<8h", 3, 0, 40, 48, 1, 1, 1, 1)), "cannot be used|empty"),
    "NaN": (".nii.gz", lambda f: write(f, np.where(GOOD > 130, np.nan, GOOD).astype(np.float32)), "NaN"),
    "infinite": (".nii.gz", lambda f: write(f, np.where(GOOD > 130, -np.inf, GOOD).astype(np.float32)), "infinite"),
    "overflows float32": (".nii.gz", lambda f: nifti(f, GOOD.astype(np.float64) * 1e300), "float32|infinite|constant"),
    "constant": (".nii.gz", lambda f: write(f, np.full(SHAPE, 7, np.float32)), "constant: every voxel is 7"),
    "zeros": (".nii.gz", lambda f: write(f, np.zeros(SHAPE, np.float32)), "constant"),
    "spacing 0": (".nii", lambda f: patched(f, SPACINGS, struct.pack("<8f", 1, 0, 0, 0, 0, 0, 0, 0)), "its spacing is 0"),
    "spacing below 0": (".nii", lambda f: patched(f, SPACINGS, struct.pack("<8f", 1, -1.5, 1.5, 5, 0, 0, 0, 0)), None),
    "spacing NaN": (".nii", lambda f: patched(f, SPACINGS, struct.pack("<8f", 1, np.nan, 1.5, 5, 0, 0, 0, 0)), "spacing is nan"),
    "spacing of a metre": (".nii.gz", lambda f: write(f, spacing=(1e3, 1e3, 1e3)), "at the plan's spacing"),
    "spacing of a nanometre": (".nii.gz", lambda f: write(f, spacing=(1e-6, 1e-6, 1e-6)), "at the plan's spacing"),
    "header of 8 GiB": (".nii", lambda f: patched(f, DIMENSIONS, HUGE), "cut short"),
    "header of 8 GiB, compressed": (".nii.gz", lambda f: compressed(f, huge_nifti(f.parent)), "cut short"),
    "data longer than the header": (".nii", lambda f: (write(f), f.write_bytes(f.read_bytes() + b"more")), None),
    "data shorter than the header": (".nii", lambda f: cut(f, 0.5), "cut short"),
    "gz cut short": (".nii.gz", lambda f: cut(f, 0.7), "cannot be used"),
    "gz cut by a byte": (".nii.gz", lambda f: (write(f), f.write_bytes(f.read_bytes()[:-1])), None),
    "not compressed": (".nii.gz", lambda f: f.write_bytes(plain_nifti(f.parent)), "cannot be used"),
    "compressed by another name": (".nii", lambda f: renamed("c.nii.gz", f), "cannot be used"),
    "text": (".nii.gz", lambda f: f.write_text("not an image"), "cannot be used"),
    "empty": (".nii.gz", lambda f: f.write_bytes(b""), "cannot be used"),
    "noise": (".nii.gz", lambda f: f.write_bytes(os.urandom(5000)), "cannot be used"),
    "wrong ending": (".nii.gz", lambda f: renamed("p.nrrd", f), "cannot be used"),
}  # fmt: skip


@pytest.fixture(scope="module")
def configuration(planned):
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, planned.folder)
        loaded = DatasetConfiguration.load("901", "nnUNetPlans", "2d")
        cases._initialise(loaded)
        yield loaded


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.timeout(30, func_only=True)
def test_a_file_is_read_or_refused_with_the_reason(kind, configuration, tmp_path):
    ending, make, reason = FILES[kind]
    file = tmp_path / f"bild mit leerzeichen_0000{ending}"
    make(file)
    case = CaseFiles([str(file)], None, 1, [])
    reader = configuration.plans_manager.image_reader_writer_class
    wrong, _ = cases._preprocess_case(case, reader, tmp_path / "out" / "case", {})
    made = tmp_path / "out" / "case.b2nd"
    if reason is None:
        assert wrong is None
        data = blosc2.open(str(made))[:]
        assert data.shape[0] == 1 and data.dtype == np.float32 and np.isfinite(data).all()
        assert data.std() > 0.1  # z-scored
    else:
        assert wrong and str(file) in wrong and re.search(reason, wrong), wrong
        assert "\n" not in wrong and not made.exists()


def test_links_are_followed_as_in_nnunet_and_special_files_are_refused(workspace, target, tmp_path):
    folder = workspace.raw / DATASET / "imagesUn"
    write(tmp_path / "archive.nii.gz")
    (folder / "out_0000.nii.gz").symlink_to(tmp_path / "archive.nii.gz")
    (folder / "gone_0000.nii.gz").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe_0000.nii.gz")  # reading a pipe would wait for ever
    (folder / "folder_0000.nii.gz").mkdir()
    (source,) = find_sources(target, [])
    assert set(source.invalid_cases) == {"gone", "pipe", "folder"} and "out" in source.cases
    for case, words in {"gone": "cannot be read", "pipe": "no file", "folder": "no file"}.items():
        assert f"{case}_0000.nii.gz" in source.invalid_cases[case] and words in source.invalid_cases[case]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_image_with_two_names_counts_once(workspace, target, link):
    raw = workspace.raw / DATASET
    names = {case.name for case in training_cases(target)}
    link(raw / "imagesTr" / f"{min(names)}_0000.nii.gz", raw / "imagesUn" / "held_out_0000.nii.gz")
    link(raw / "imagesUn" / "case_005_0000.nii.gz", raw / "imagesUn" / "twice_0000.nii.gz")
    (source,) = cases.sources_in_use(target, [])
    assert set(source.cases) == {f"case_00{number}" for number in (5, 6, 7, 8)}
    images = RawImages.find(DATASET)
    assert set(images.unlabelled) == set(source.cases) and set(images.labelled) == names


def test_a_name_that_is_not_in_utf8_is_refused(workspace, target):
    folder = os.fsencode(workspace.raw / DATASET / "imagesUn")
    os.rename(folder + b"/case_005_0000.nii.gz", folder + b"/M\xfcller_0000.nii.gz")
    with pytest.raises(UserError, match=r"ller_0000\.nii\.gz has a name that is not in UTF-8"):
        cases.preprocess_unlabelled(target, (), processes=1)
    done = cases.preprocess_unlabelled(target, (), processes=1, skip_unreadable=True)
    assert len(done.cases) == 3 and len(done.skipped) == 1


@pytest.mark.parametrize("link", [True, False])
def test_inaccessible_unlabelled_images_are_reported(workspace, target, link):
    """The folder is a link to an unmounted disk, or missing although its preprocessed images are here."""
    folder = workspace.raw / DATASET / "imagesUn"
    folder.rename(workspace.folder / "archive")
    if link:
        folder.symlink_to(workspace.folder / "not_mounted")
    words = "is a link to .*not_mounted" if link else "holds 4 images that were preprocessed from it.*rm -r"
    with pytest.raises(UserError, match=words):
        cases.preprocess_unlabelled(target, (), processes=1)
    folder.unlink(missing_ok=True)
    folder.symlink_to(workspace.folder / "archive")
    assert len(cases.preprocess_unlabelled(target, (), processes=1).cases) == 4
    folder.unlink()
    shutil.rmtree(cases.unlabelled_folder(target))
    assert cases.preprocess_unlabelled(target, (), processes=1).cases == []


@pytest.mark.parametrize("content", [b"", pytest.param(b"\0\5\26\7", marks=pytest.mark.slow)])
def test_another_data_sets_first_file_need_not_be_an_image(workspace, target, content):
    other = workspace.raw / "Dataset906_Other"
    shutil.copytree(workspace.raw / DATASET, other)
    (other / "imagesTr" / "a_case_0000.nii.gz").write_bytes(content)
    with pytest.raises(UserError, match="a_case_0000"):
        cases.preprocess_unlabelled(target, ["Dataset906_Other"], processes=1)
    done = cases.preprocess_unlabelled(target, ["Dataset906_Other"], processes=1, skip_unreadable=True)
    assert len(done.cases) == 4 + 9 and len(done.skipped) == 1


@pytest.mark.parametrize("case", ["../../x", "a/b", "..", "", "a\\b"])
def test_case_names_that_lead_out_of_the_folder_are_refused(workspace, target, case):
    other = workspace.raw / "Dataset905_Hostile"
    other.mkdir()
    description = {"channel_names": {"0": "MR0"}, "file_ending": ".nii.gz", "labels": {"background": 0}}
    description["dataset"] = {case: {"images": ["x.nii.gz"], "label": "y.nii.gz"}}
    (other / "dataset.json").write_text(json.dumps(description))
    write(other / "x.nii.gz")
    with pytest.raises(UserError, match=r"Dataset905_Hostile/dataset\.json lists a case"):
        find_sources(target, ["Dataset905_Hostile"])


def test_a_link_in_place_of_a_preprocessed_case_is_replaced_and_not_followed(target, tmp_path):
    (case, *_) = cases.preprocess_unlabelled(target, [], processes=1).cases
    precious = tmp_path / "precious"
    os.replace(case.file, precious)
    before = precious.read_bytes()
    os.symlink(precious, case.file)
    cases.preprocess_unlabelled(target, [], processes=1)
    assert not os.path.islink(case.file) and precious.read_bytes() == before
