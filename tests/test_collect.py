"""Collecting DICOM and NIfTI files into imagesUn: the right series, the same voxels, and no names of patients."""

import csv
import gzip
import os
import re
import signal
import stat
import subprocess
import time

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import largest_file
from dicom_files import AXIAL, CORONAL, SAGITTAL, volume, write_series

from nnunetv2_macl.collecting.collect import _WORK_FOLDER, collect
from nnunetv2_macl.collecting.dicom import group_series, read_header, sort_slices, why_not
from nnunetv2_macl.collecting.pseudonyms import KEY_FILE, load_key
from nnunetv2_macl.collecting.table import read_table
from nnunetv2_macl.collecting.voxels import Job, _is_segmentation, make_image
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import read_json
from nnunetv2_macl.raw_data import raw_data_set

LOCALIZER = "ORIGINAL\\PRIMARY\\LOCALIZER"


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nnUNet_raw"))
    return tmp_path / "nnUNet_raw"


def rows(table):
    with open(table, newline="") as stream:
        return list(csv.DictReader(stream))


def archive(folder):
    """Write two patients with three good MR series, and everything else that archives hold."""
    doe = folder / "Doe_Jane" / "study"
    write_series(doe / "t2", volume(1), "1.1")
    write_series(doe / "t2_again", volume(1), "1.1")
    write_series(doe / "t2_resent", volume(1), "1.9", image_uid="1.1")
    write_series(doe / "t2_under_new_ids", volume(1), "1.8")
    write_series(doe / "all", volume(2), "1.2", orientation=SAGITTAL)
    write_series(doe / "all", volume(3, (3, 24, 32)), "1.3", image_type=LOCALIZER, start=20)
    write_series(doe / "all", volume(4, (6, 24, 32)), "1.4", description="3-plane scout", start=40)
    write_series(doe / "mip", volume(5), "1.5", image_type="DERIVED\\SECONDARY\\MIP")
    smith = folder / "Smith"
    write_series(smith / "t1", volume(6), "2.1", "ID 2", "Smith^John", compressed=True)
    write_series(smith / "one", volume(7, (1, 24, 32)), "2.2", "ID 2", "Smith^John")
    write_series(smith / "mixed", volume(8, (6, 24, 32)), "2.3", "ID 2", "Smith^John")
    write_series(smith / "mixed", volume(9, (6, 24, 32)), "2.3", "ID 2", "Smith^John", orientation=CORONAL, start=20)
    write_series(smith / "broken", volume(10), "2.4", "ID 2", "Smith^John")
    bad = smith / "broken" / "0003.dcm"
    bad.write_bytes(bad.read_bytes()[:-100])
    write_series(smith / "ct", volume(11), "2.5", "ID 2", "Smith^John", modality="CT")
    write_series(smith / "compressed", volume(12), "2.6", "ID 2", "Smith^John", compressed=True)
    for file in (smith / "compressed").iterdir():  # replace JPEG 2000 by JPEG in the header
        file.write_bytes(file.read_bytes().replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.50"))
    (smith / "note.txt").write_text("hello")
    (smith / "junk.dcm").write_bytes(b"junk" * 100)


def test_an_archive_becomes_one_image_for_each_scan(tmp_path, raw):
    archive(tmp_path / "archive")
    private = tmp_path / "private"
    table = collect(tmp_path / "archive", "28", modality="MR", private_folder=private, processes=2)

    data_set = raw / "Dataset028_Collected"
    assert read_json(data_set / "dataset.json", "")["channel_names"] == {"0": "MR"}
    names = sorted(path.name for path in (data_set / "imagesUn").iterdir())
    assert all(re.fullmatch(r"p[0-9a-f]{12}_s[0-9a-f]{8}_0000\.nii\.gz", name) for name in names)
    taken = {row["series"]: row for row in rows(table) if row["taken"] == "yes"}
    assert sorted(taken) == ["1.1", "1.2", "2.1"] and sorted(row["image"] for row in taken.values()) == names
    patient = {series: row["image"].split("_")[0] for series, row in taken.items()}
    assert patient["1.1"] == patient["1.2"] != patient["2.1"]

    reasons = {
        row["series"] or os.path.basename(row["source"]): row["reason"] for row in rows(table) if row["taken"] == "no"
    }
    beginnings = {
        "1.9": "duplicate", "1.8": "duplicate", "1.3": "localizer", "1.4": "localizer", "1.5": "derived",
        "2.2": "1 single slice", "2.3": "mixed orientation", "2.4": "missing slices", "0003.dcm": "cannot be read",
        "2.6": "cannot be read", "2.5": "another modality", "junk.dcm": "cannot be read", "note.txt": "neither",
    }  # fmt: skip
    assert set(reasons) == set(beginnings)
    assert "1.2.840.10008.1.2.4.50" in reasons["2.6"]
    for key, beginning in beginnings.items():
        assert reasons[key].startswith(beginning), (key, reasons[key])
    assert len(rows(table)) == len(taken) + len(reasons)

    for series, expected in {"1.1": volume(1), "1.2": volume(2), "2.1": volume(6)}.items():
        image = sitk.ReadImage(str(data_set / "imagesUn" / taken[series]["image"]))
        assert np.array_equal(sitk.GetArrayFromImage(image), expected)
        assert np.allclose(image.GetSpacing(), (1.5, 1.5, 5.0))
        direction = SAGITTAL if series == "1.2" else AXIAL
        assert np.allclose(np.array(image.GetDirection()).reshape(3, 3)[:, :2].T.ravel(), direction)
    for file in (data_set / "imagesUn").iterdir():
        content = gzip.decompress(file.read_bytes())
        assert not any(word in content for word in (b"Doe", b"Smith", b"ID 1", b"ID 2", b"1950"))

    assert stat.S_IMODE((private / KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(table.stat().st_mode) == 0o600 and not table.is_relative_to(raw)

    # Another call writes nothing again, and a new scan of a known patient gets the patient's pseudonym.
    before = {name: (data_set / "imagesUn" / name).stat().st_mtime_ns for name in names}
    write_series(tmp_path / "later", volume(20), "1.7")
    collect(tmp_path / "later", "28", private_folder=private, processes=1)
    write_series(tmp_path / "archive" / "a_first_folder", volume(1), "1.6", image_uid="1.1")
    again = collect(tmp_path / "archive", "28", modality="MR", private_folder=private, processes=2)
    assert {name: (data_set / "imagesUn" / name).stat().st_mtime_ns for name in names} == before
    taken = {row["series"]: row for row in rows(again) if row["taken"] == "yes"}
    assert sorted(taken) == ["1.1", "1.2", "1.7", "2.1"]
    assert next(row for row in rows(again) if row["series"] == "1.6")["reason"].startswith("duplicate")
    assert taken["1.7"]["image"].startswith(patient["1.1"])


def series_of(folder):
    """Return the only series in a folder."""
    (series,) = group_series(read_header(file) for file in sorted(folder.iterdir())).values()
    return series


@pytest.mark.parametrize(
    "positions, reason",
    [
        ([0, 5, 10, 15, 25, 30], "missing slices: 10.00 mm"),
        ([0, 5, 10, 0, 5, 10], "4D: up to 2 images at each of 3"),
        ([7] * 6, "one slice position with 6 images"),
        ([0, 5.01, 10, 14.99, 20, 25], None),
        ([7], None),
    ],
)
def test_positions_of_slices(tmp_path, positions, reason):
    write_series(tmp_path / "dicom", volume(1, (len(positions), 24, 32)), "1.1", positions=positions)
    answer = why_not(series_of(tmp_path / "dicom"), min(5, len(positions)), False)
    assert answer is None if reason is None else answer.startswith(reason)


def test_slices_of_a_few_micrometres_are_at_different_positions(tmp_path):
    write_series(tmp_path / "dicom", volume(1, (12, 24, 32)), "1.1", positions=[0.006 * n for n in range(12)])
    series = series_of(tmp_path / "dicom")
    series.slices = [s._replace(spacing=(0.006, 0.006)) for s in series.slices]
    assert why_not(series, 5, False) is None


def test_slices_are_sorted_by_position_and_a_tilt_is_detected(tmp_path):
    write_series(tmp_path / "dicom", volume(1), "1.1", orientation=CORONAL)
    series = series_of(tmp_path / "dicom")
    assert [s.image for s in sort_slices(series.slices)] == [f"1.1.{n}" for n in range(1, 9)]
    series.slices = [s._replace(position=(s.position[0], s.position[1], 0.1 * s.position[1])) for s in series.slices]
    assert why_not(series, 5, False).startswith("gantry tilt")


def test_series_are_left_out_by_their_headers(tmp_path):
    write_series(tmp_path / "dicom", volume(1), "1.1", image_type="DERIVED\\PRIMARY\\AXIAL")
    series = series_of(tmp_path / "dicom")
    assert (
        why_not(series, 5, keep_derived=False).startswith("derived") and why_not(series, 5, keep_derived=True) is None
    )
    for change, reason in {
        ("frames", 20): "multi-frame",
        ("channels", 3): "colour",
        ("position", None): "no position",
        ("shape", ("10", "10")): "slices of different sizes",
        ("modality", "SEG"): "no scan",
    }.items():
        changed = group_series([series.slices[0]._replace(**dict([change])), *series.slices[1:]])["1.1"]
        assert why_not(changed, 5, keep_derived=True).startswith(reason)


def write_nifti(file, array, spacing=(1.0, 1.0, 3.0)):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.int16))
    image.SetSpacing(spacing)
    image.SetMetaData("descrip", "Doe, Jane")
    sitk.WriteImage(image, str(file))


def test_nifti_files(tmp_path, raw):
    tree = tmp_path / "tree"
    write_nifti(tree / "Doe" / "a.nii.gz", volume(1))
    write_nifti(tree / "Doe" / "b.nii", volume(2))
    write_nifti(tree / "Doe" / "a copy.nii", volume(1))
    write_nifti(tree / "Smith.nii.gz", volume(3))
    write_nifti(tree / "Smith_seg.nii.gz", volume(3) > 500)
    write_nifti(tree / "flat.nii.gz", np.full((8, 8, 8), 7))
    write_nifti(tree / "thin.nii.gz", volume(4, (2, 24, 32)))
    sitk.WriteImage(
        sitk.JoinSeries([sitk.GetImageFromArray(volume(n).astype(np.int16)) for n in (5, 6)]), str(tree / "cine.nii.gz")
    )
    (tree / "cut.nii.gz").write_bytes((tree / "Smith.nii.gz").read_bytes()[:-500])
    with pytest.raises(UserError, match="--modality"):
        collect(tree, "28", private_folder=tmp_path / "private")
    assert not (raw / "Dataset028_Collected").exists()
    options = dict(modality="MR", private_folder=tmp_path / "private", processes=1)
    table = collect(tree, "Dataset028_Archive", link=True, **options)
    by_name = {os.path.relpath(row["source"], tree): row for row in rows(table)}
    taken = {name: row["image"] for name, row in by_name.items() if row["taken"] == "yes"}
    assert sorted(taken) == ["Doe/a copy.nii", "Doe/b.nii", "Smith.nii.gz"]
    beginnings = {
        "Doe/a.nii.gz": "duplicate", "Smith_seg.nii.gz": "a segmentation", "flat.nii.gz": "constant",
        "thin.nii.gz": "its size is 32x24x2", "cine.nii.gz": "4D", "cut.nii.gz": "cannot be read",
    }  # fmt: skip
    assert {n: by_name[n]["reason"][: len(b)] for n, b in beginnings.items()} == beginnings
    images = raw / "Dataset028_Archive" / "imagesUn"
    assert sorted(p.name for p in images.iterdir()) == sorted(taken.values())
    assert (images / taken["Smith.nii.gz"]).samefile(tree / "Smith.nii.gz")
    for name, seed in {"Doe/a copy.nii": 1, "Doe/b.nii": 2}.items():
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(images / taken[name]))), volume(seed))
        assert b"Jane" not in gzip.decompress((images / taken[name]).read_bytes())
    assert (
        taken["Doe/b.nii"].split("_")[0] == taken["Doe/a copy.nii"].split("_")[0] != taken["Smith.nii.gz"].split("_")[0]
    )

    # Another tree has a file of the same path, which is another patient.
    write_nifti(tmp_path / "site_b" / "Adams.nii.gz", volume(8))
    write_nifti(tmp_path / "site_b" / "Doe" / "b.nii", volume(9))
    before = {path: path.read_bytes() for path in images.iterdir()}
    with pytest.raises(UserError, match=r"site_b/Doe/b\.nii and .*tree/Doe/b\.nii.*--patient_regex"):
        collect(tmp_path / "site_b", "28", **options)
    assert {path: path.read_bytes() for path in images.iterdir()} == before
    assert [row for row in rows(table) if row["taken"] == "yes"] == [
        row for row in by_name.values() if row["taken"] == "yes"
    ]


def test_label_maps_of_many_values_are_segmentations_and_flat_scans_are_not():
    plane, row, column = np.indices((10, 24, 32))
    parcels = 1000 + plane // 5 * 12 + row // 8 * 4 + column // 8
    parcels[:2] = 0
    padded = volume(2)
    padded[:, :, 8:] = -1024  # air of one value, as in many CT images
    padded[:, 16:] = -2000  # outside the field of view
    assert len(np.unique(parcels)) > 16 and _is_segmentation(parcels)
    assert not _is_segmentation(padded) and not _is_segmentation(parcels + 0.5)


def test_converted_volumes_next_to_dicom_files_are_of_the_same_patient(tmp_path, raw):
    """A series that cannot be read as one volume is converted with dcm2niix, often into its own folder."""
    write_series(tmp_path / "tree" / "patient_a" / "t2", volume(1), "1.1", "ID 1")
    write_nifti(tmp_path / "tree" / "patient_a" / "converted.nii", volume(2))
    write_series(tmp_path / "tree" / "mixed" / "one", volume(3), "1.3", "ID 3")
    write_series(tmp_path / "tree" / "mixed" / "two", volume(4), "1.4", "ID 4")
    write_nifti(tmp_path / "tree" / "mixed" / "converted.nii", volume(5))
    table = collect(tmp_path / "tree", "28", private_folder=tmp_path / "private", processes=1)
    patients = {row["source"].removeprefix(str(tmp_path / "tree")): row["patient"] for row in rows(table)}
    of_a = {patient for source, patient in patients.items() if source.startswith("/patient_a")}
    mixed = {patient for source, patient in patients.items() if source.startswith("/mixed")}
    assert len(of_a) == 1 and len(mixed) == 3


def test_what_may_hold_a_name_and_what_is_no_file_is_left_out(tmp_path, raw):
    write_series(tmp_path / "tree" / "a", volume(1), "1.1", "ID 1", description="=1+1")
    write_series(tmp_path / "tree" / "b", volume(2), "1.2", "ID 2", burned_in="YES")
    os.mkfifo(tmp_path / "tree" / "pipe")
    table = collect(tmp_path / "tree", "28", private_folder=tmp_path / "private", processes=1)
    reasons = {row["source"].removeprefix(str(tmp_path / "tree")).split("/")[1]: row["reason"] for row in rows(table)}
    assert reasons["a"] == "" and "burned into the image" in reasons["b"] and reasons["pipe"] == "no regular file"
    assert rows(table)[0]["description"].startswith("'=1+1")  # no formula for a spreadsheet
    assert stat.S_IMODE(table.stat().st_mode) == 0o600


def test_images_that_were_removed_or_renamed_are_not_written_again(tmp_path, raw, caplog):
    for number in (1, 2, 3):
        write_series(tmp_path / "tree" / str(number), volume(number), f"1.{number}", f"ID {number}")
    options = dict(private_folder=tmp_path / "private", processes=1)
    table = collect(tmp_path / "tree", "28", **options)
    unlabelled = raw / "Dataset028_Collected" / "imagesUn"
    first, second, third = sorted(unlabelled.iterdir())
    unlabelled.with_name("imagesTr").mkdir()
    first.rename(unlabelled.with_name("imagesTr") / "patient01_0000.nii.gz")
    second.unlink()
    collect(tmp_path / "tree", "28", **options)
    assert sorted(unlabelled.iterdir()) == [third] and "2 of them are not in" in caplog.text
    # also the one in the last line of the table
    third.rename(unlabelled.with_name("kept_0000.nii.gz"))
    collect(tmp_path / "tree", "28", **options)
    assert not list(unlabelled.iterdir())
    unlabelled.with_name("kept_0000.nii.gz").rename(third)
    # A run that was killed has written the last line before its image, and has left its folder.
    last = table.read_text().splitlines()[-1].split(",")
    (image,) = (unlabelled / part for part in last if part.startswith("p") and part.endswith(".nii.gz"))
    image.unlink(missing_ok=True)
    (unlabelled / _WORK_FOLDER).mkdir()
    collect(tmp_path / "tree", "28", **options)
    assert image.is_file() and not (unlabelled / _WORK_FOLDER).exists()
    if image != third:
        image.unlink()
    lines = [line for line in table.read_text().splitlines(True) if second.name not in line]
    table.write_text("".join(lines))
    collect(tmp_path / "tree", "28", **options)
    assert sorted(unlabelled.iterdir()) == sorted([second, third])


def test_an_incomplete_copy_of_a_series_does_not_replace_it(tmp_path, raw):
    for place, count, slices in (("most", 6, 6), ("all", 8, 8), ("few", 5, 8)):
        write_series(tmp_path / place, volume(1)[:count], "1.1")
        table = collect(tmp_path / place, "28", private_folder=tmp_path / "private", processes=1)
        (image,) = (raw / "Dataset028_Collected" / "imagesUn").iterdir()
        assert sitk.ReadImage(str(image)).GetSize()[2] == slices
    taken, left_out = rows(table)
    assert taken["taken"] == "yes" and taken["image"] == image.name and "/all/" in taken["source"]
    assert left_out["taken"] == "no" and left_out["reason"].startswith("duplicate") and "/few/" in left_out["source"]


@pytest.mark.parametrize("folder", ["imagesTs", "imagesTr"])
def test_images_that_were_set_aside_are_not_collected_again(tmp_path, raw, folder):
    """They would be pre-trained on."""
    for number in (1, 2):
        write_series(tmp_path / "tree" / str(number), volume(number), f"1.{number}", f"ID {number}")
    collect(tmp_path / "tree", "28", private_folder=tmp_path / "private", processes=1)
    unlabelled = raw / "Dataset028_Collected" / "imagesUn"
    moved, kept = sorted(unlabelled.iterdir())
    unlabelled.with_name(folder).mkdir()
    moved.rename(unlabelled.with_name(folder) / moved.name)
    write_series(tmp_path / "tree" / "3", volume(3), "1.3", "ID 3")
    table = collect(tmp_path / "tree", "28", private_folder=tmp_path / "private", processes=1)
    there = {path.name for path in unlabelled.iterdir()}
    assert len(there) == 2 and kept.name in there and moved.name not in there
    assert {row["image"] for row in rows(table)} == there | {moved.name}


def test_a_copy_does_not_contain_the_name_of_its_source(tmp_path, raw):
    tree = tmp_path / "tree"
    write_nifti(tree / "image.nii.gz", volume(1))
    content = gzip.decompress((tree / "image.nii.gz").read_bytes())
    (tree / "image.nii.gz").unlink()
    with gzip.open(tree / "Doe_Jane.nii.gz", "wb") as named:
        named.write(content)
    assert b"Doe_Jane" in (tree / "Doe_Jane.nii.gz").read_bytes()
    collect(tree, "Dataset028_Archive", modality="MR", private_folder=tmp_path / "private", processes=1)
    (copy,) = (raw / "Dataset028_Archive" / "imagesUn").iterdir()
    assert b"Doe_Jane" not in copy.read_bytes() and gzip.decompress(copy.read_bytes()) == content


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_an_image_that_could_not_be_written_completely_is_no_image(tmp_path, ending):
    """ITK's writer of NIfTI raises no error on a full disk."""
    write_nifti(tmp_path / ("a.nii" if ending == ".nii.gz" else "a.nii.gz"), volume(1))
    job = Job([str(next(tmp_path.iterdir()))], str(tmp_path / f"image{ending}"), False, 3, False)
    with largest_file(4096):
        made = make_image(job)
    assert made.failed and not made.left_out and not made.voxels
    assert make_image(job).voxels


def test_files_that_no_reader_can_open_are_left_out(tmp_path, raw):
    """ITK does not check the end of a compressed file, and ends the process for a path that is not in UTF-8."""
    tree = tmp_path / "tree"
    write_nifti(tree / "good.nii.gz", volume(1))
    write_nifti(tree / "cut.nii.gz", volume(2))
    (tree / "cut.nii.gz").write_bytes((tree / "cut.nii.gz").read_bytes()[:-4])
    foreign = os.path.join(os.fsencode(tree), b"M\xfcller")
    os.mkdir(foreign)
    for name in (b"a.nii.gz", b"b.dcm"):
        with open(os.path.join(foreign, name), "wb") as stream:
            stream.write((tree / "good.nii.gz").read_bytes())
    table = read_table(collect(tree, "28", modality="MR", private_folder=tmp_path / "private", processes=1))
    reasons = {os.path.basename(row.source): row.reason[:9] for row in table}
    assert reasons == {"good.nii.gz": "", "cut.nii.gz": "cannot be", "a.nii.gz": "its path ", "b.dcm": "its path "}


def test_images_get_the_ending_of_the_data_set(tmp_path, raw):
    write_series(tmp_path / "tree" / "dicom", volume(1), "1.1")
    write_nifti(tmp_path / "tree" / "Doe.nii.gz", volume(2))
    (raw / "Dataset028_There").mkdir(parents=True)
    file = raw / "Dataset028_There" / "dataset.json"
    file.write_text('{"channel_names": {"0": "T1"}, "file_ending": ".nrrd"}')
    before = file.read_text()
    table = collect(tmp_path / "tree", "28", private_folder=tmp_path / "private", processes=1, link=True)
    assert file.read_text() == before
    for row in rows(table):
        image = raw / "Dataset028_There" / "imagesUn" / row["image"]
        assert image.suffix == ".nrrd"
        expected = volume(1 if row["kind"] == "DICOM" else 2)
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(image))), expected)
        assert b"Doe" not in image.read_bytes()


def test_the_key_is_kept_and_guarded(tmp_path, raw):
    write_series(tmp_path / "dicom", volume(1), "1.1")
    first = load_key(tmp_path / "private")
    assert (
        first.patient("Doe") == load_key(tmp_path / "private").patient("Doe") != load_key(tmp_path / "b").patient("Doe")
    )
    collect(tmp_path / "dicom", "28", private_folder=tmp_path / "private", processes=1)
    with pytest.raises(UserError, match=r"1 collected image .*--private_folder"):
        collect(tmp_path / "dicom", "28", private_folder=tmp_path / "forgotten", processes=1)
    assert len(list((raw / "Dataset028_Collected" / "imagesUn").iterdir())) == 1
    (tmp_path / "private" / KEY_FILE).unlink()
    with pytest.raises(UserError, match="another key"):
        collect(tmp_path / "dicom", "28", private_folder=tmp_path / "private", processes=1)
    (tmp_path / "private" / KEY_FILE).chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        load_key(tmp_path / "private")
    with pytest.raises(UserError, match="--private_folder"):
        collect(tmp_path / "dicom", "28", private_folder=raw / "Dataset028_Collected" / "private")


def test_the_table_is_never_emptied(tmp_path, raw, monkeypatch):
    write_series(tmp_path / "dicom", volume(1), "1.1")
    write_series(tmp_path / "other", volume(2), "1.2", "ID 2")
    options = dict(private_folder=tmp_path / "private", processes=1)
    table = collect(tmp_path / "dicom", "28", **options)
    header, line = table.read_text().splitlines()
    # What spreadsheets and other programs make of it
    for wrong in (
        f"{header},note\n{line},good\n",
        f"{header};\n{line}\n".replace(",", ";"),
        f"{header}\nyes\n{line}\n",
    ):
        table.write_text(wrong)
        with pytest.raises(UserError, match=re.escape(str(table))):
            collect(tmp_path / "dicom", "28", **options)
        assert table.read_text() == wrong
    # Spreadsheets write a byte order mark, and a killed run cuts the last line short.
    for length in (10, len(line) - 1):
        table.write_text(f"\ufeff{header}\n{line}\n{line[:length]}", encoding="utf-8")
        assert [row.series for row in read_table(table)] == ["1.1"]
    # The data set of another project has the same name and the same private folder.
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "other_raw"))
    collect(tmp_path / "other", "28", **options)
    assert sorted(row["series"] for row in rows(table) if row["taken"] == "yes") == ["1.1", "1.2"]


def test_mistakes_are_explained(tmp_path, raw):
    options = dict(private_folder=tmp_path / "private", processes=1)
    write_series(tmp_path / "dicom" / "mr", volume(1), "1.1")
    write_series(tmp_path / "dicom" / "ct", volume(2), "1.2", modality="CT")
    with pytest.raises(UserError, match=r"1 MR image.*--modality"):
        collect(tmp_path / "dicom", "28", **options)
    for wrong in ("0", "x", "Dataset28_A", "../Dataset028_A", "Dataset٠٢٨_A", "Dataset028_A:", "Dataset028_A."):
        with pytest.raises(UserError, match="-d"):
            collect(tmp_path / "dicom", wrong, **options)
    for channels, ending in (({"0": "T1", "1": "T2"}, ".nii.gz"), ({"0": "R"}, ".png"), ({"0": "CT"}, ".nii.gz")):
        folder = raw / f"Dataset{len(ending)}0{len(channels)}_There"
        folder.mkdir(parents=True, exist_ok=True)
        text = f'{{"channel_names": {channels}, "file_ending": "{ending}"}}'.replace("'", '"')
        (folder / "dataset.json").write_text(text)
        with pytest.raises(UserError, match="-d"):
            collect(tmp_path / "dicom", folder.name, modality="MR", **options)
        assert (folder / "dataset.json").read_text() == text
    with pytest.raises(UserError, match="holds no image that"):
        collect(tmp_path / "dicom", "28", modality="PT", **options)
    with pytest.raises(UserError, match="not a folder"):
        collect(tmp_path / "none", "28", **options)
    with pytest.raises(UserError, match="itself"):
        collect(folder, folder.name, **options)


def test_a_data_set_of_another_modality_is_refused(tmp_path, raw):
    write_series(tmp_path / "dicom", volume(1), "1.1", modality="MR")
    folder = raw / "Dataset028_There"
    folder.mkdir(parents=True)
    for channel in ("CT", "ct", "PET"):
        (folder / "dataset.json").write_text(f'{{"channel_names": {{"0": "{channel}"}}, "file_ending": ".nii.gz"}}')
        with pytest.raises(UserError, match=f"is {channel}, .* MR"):
            collect(tmp_path / "dicom", "28", private_folder=tmp_path / "private", processes=1)
    assert [file.name for file in folder.iterdir()] == ["dataset.json"]


@pytest.mark.parametrize("place", ["nnUNet_preprocessed", "nnUNet_results"])
def test_a_number_that_nnunet_knows_elsewhere_is_refused(tmp_path, raw, monkeypatch, place):
    monkeypatch.setenv(place, str(tmp_path / place))
    (tmp_path / place / "Dataset028_Old").mkdir(parents=True)
    for taken in ("28", "Dataset028_New"):
        with pytest.raises(UserError, match=f"{place}/Dataset028_Old"):
            raw_data_set(taken, "Collected")
    assert raw_data_set("Dataset028_Old", "Collected") == raw / "Dataset028_Old"
    (raw / "Dataset028_Old").mkdir(parents=True)
    assert raw_data_set("28", "Collected") == raw / "Dataset028_Old"
    assert raw_data_set("29", "Collected") == raw / "Dataset029_Collected"


@pytest.mark.slow
def test_a_run_that_is_stopped_continues(tmp_path):
    for number in range(12):
        write_series(tmp_path / "dicom" / str(number), volume(number, (40, 256, 256)), f"1.{number}", f"ID {number}")
    environment = dict(os.environ) | {"nnUNet_raw": str(tmp_path / "raw"), "HOME": str(tmp_path)}
    command = ["nnUNetv2_macl_collect", str(tmp_path / "dicom"), "-d", "28", "-np", "1"]
    images = tmp_path / "raw" / "Dataset028_Collected" / "imagesUn"
    for number in (signal.SIGINT, signal.SIGKILL):
        there = len(list(images.glob("p*")))
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while len(list(images.glob("p*"))) <= there + 1:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, number)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode and "Traceback" not in errors
    done = {file.name: file.stat().st_mtime_ns for file in images.glob("p*")}
    assert 4 <= len(done) < 12
    subprocess.run(command, env=environment, check=True, timeout=300)
    now = {file.name: file.stat().st_mtime_ns for file in images.iterdir()}
    assert len(now) == 12
    assert all(now[name] == when for name, when in done.items())
    assert len(rows(tmp_path / "nnunetv2_macl_private" / "Dataset028_Collected.csv")) == 12
    assert sorted(path.name for path in images.parent.iterdir()) == ["dataset.json", "imagesUn"]
    assert len(list(images.iterdir())) == 12


@pytest.mark.slow
def test_collected_dicom_pretrains_what_is_fine_tuned(workspace, tmp_path):
    """This runs the commands of docs/getting_started/from_dicom.md on generated data."""
    for number in range(4):
        write_series(tmp_path / "dicom" / str(number), volume(number, (8, 48, 48)), f"1.{number}", f"ID {number}")
    private = str(tmp_path / "private")
    command = ("nnUNetv2_macl_collect", tmp_path / "dicom", "-d", "28", "--modality", "MR", "--private_folder", private)
    assert "4 images of 4 patients" in workspace.run(*command, "-np", "1")
    workspace.pretrain("901", "-c", "2d", "-u", "28", "--channel_map", "MR0=MR")
    assert len(list(workspace.preprocessed.glob("*/nnUNetPlans_macl_2d/Dataset028_Collected/*.b2nd"))) == 4
    weights = workspace.run_folder("nnUNetTrainerMACLPretrain") / "macl_encoder.pth"
    assert weights.is_file()
    trainer = "nnUNetTrainerMACL_1epoch"
    workspace.run("nnUNetv2_train", "901", "2d", "0", "-tr", trainer, "-device", "cpu")
    assert (workspace.run_folder(trainer, fold=0) / "checkpoint_final.pth").is_file()
