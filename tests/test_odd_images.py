"""Images as archives contain them: with sidecar files, with another file ending, and with localizers among volumes."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from conftest import DATASET
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunetv2_macl import doctor
from nnunetv2_macl.doctor.dataset import readable
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.preprocessing import cases as preprocessing
from nnunetv2_macl.preprocessing.reading import UnusableImageError, read_case, single_slice_problem
from nnunetv2_macl.preprocessing.sources import (
    CaseFiles,
    RawFile,
    Source,
    find_sources,
    group_channels,
    ignored_files,
    pick_channels,
    sidecars,
    spacing_warning,
)

VOLUME = np.random.default_rng(0).normal(100, 20, (8, 40, 48)).astype(np.float32)


class Volumes:
    """What `single_slice_problem` asks of a configuration."""

    name = "3d_fullres"
    patch_size = (16, 32, 32)
    plans_manager = SimpleNamespace(transpose_forward=[0, 1, 2])
    normalises_in_mask = False


def write(file, array=VOLUME):
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file))


def source_in(folder, ending, reader):
    cases, wrong = pick_channels(group_channels(folder, ending), [0], ["MR"])
    assert not wrong
    return Source("Dataset900_There", cases, wrong, reader, ignored_files(folder, ending))


def test_the_files_that_are_read_with_an_image():
    assert sidecars("case_1_0000.tif") == sidecars("case_1_0001.TIFF") == ["case_1.json"]
    assert "a_0000.raw" in sidecars("a_0000.mhd") and "a_0000.img" in sidecars("a_0000.hdr")
    assert sidecars("a_0000.nii.gz") == []


@pytest.mark.parametrize(
    ("ending", "beside", "reader"), [(".tif", "a.json", Tiff3DIO), (".mhd", "a_0000.raw", SimpleITKIO)]
)
def test_a_change_of_a_file_that_is_read_with_an_image_changes_the_image(tmp_path, monkeypatch, ending, beside, reader):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    (tmp_path / f"a_0000{ending}").write_bytes(b"image")
    (tmp_path / "notes.txt").touch()

    def fingerprint():
        return source_in(tmp_path, ending, reader).cases["a"].fingerprint

    alone = fingerprint()
    (tmp_path / beside).write_text("{}")
    source = source_in(tmp_path, ending, reader)
    first = source.cases["a"].fingerprint
    assert first[0] == alone[0] and first[1][0] == beside
    assert source.ignored_files == [f"{tmp_path.name}/notes.txt"]
    (tmp_path / beside).write_text('{"spacing": [3, 1, 1]}')
    assert fingerprint() not in (first, alone)
    (tmp_path / beside).unlink()
    assert fingerprint() == alone


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_a_data_file_that_kept_its_name_is_read_with_its_header(tmp_path, monkeypatch, ending):
    """Users often rename only the header to the name that nnU-Net needs."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    write(tmp_path / f"patient{ending}")
    (tmp_path / f"patient{ending}").rename(tmp_path / f"patient_0000{ending}")
    source = source_in(tmp_path, ending, SimpleITKIO)
    first = source.cases["patient"].fingerprint
    assert [name for name, *_ in first] == [f"patient_0000{ending}", "patient.raw"] and not source.ignored_files
    (tmp_path / "patient.raw").write_bytes((VOLUME + 1).tobytes() + b"more")
    assert source_in(tmp_path, ending, SimpleITKIO).cases["patient"].fingerprint != first


def test_a_tiff_without_spacing_and_one_with_a_wrong_spacing_are_reported(target, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    image, spacing = tmp_path / "a_0000.tif", tmp_path / "a.json"
    tifffile.imwrite(image, VOLUME)
    assert str(image) in spacing_warning(source_in(tmp_path, ".tif", Tiff3DIO), target)
    assert spacing_warning(source_in(tmp_path, ".tif", SimpleITKIO), target) is None
    case = CaseFiles([str(image)], None, 1, [])
    for content in (
        "",
        "[]",
        '{"spacing": 1}',
        '{"spacing": [1, 1]}',
        '{"spacing": [0, 1, 1]}',
        '{"spacing": ["1", 1, 1]}',
    ):
        spacing.write_text(content)
        with pytest.raises(UnusableImageError, match=r"its spacing file .*a\.json"):
            read_case(target, case, Tiff3DIO)
    spacing.write_text('{"spacing": [3, 0.5, 0.5]}')
    assert spacing_warning(source_in(tmp_path, ".tif", Tiff3DIO), target) is None
    assert read_case(target, case, Tiff3DIO)[1]["spacing"] == [3, 0.5, 0.5]


def test_a_colour_tiff_is_no_volume(target, tmp_path):
    """nnU-Net's reader would take the colours for an axis of space."""
    tifffile.imwrite(tmp_path / "a_0000.tif", np.zeros((40, 48, 3), np.uint8), photometric="rgb")
    with pytest.raises(UnusableImageError, match="colour"):
        read_case(target, CaseFiles([str(tmp_path / "a_0000.tif")], None, 1, []), Tiff3DIO)


HEADERS = {
    "a_0000.mhd": "ObjectType = Image\nNDims = 3\nDimSize = 48 40 8\nElementType = MET_FLOAT\nElementDataFile = {}",
    "a_0000.nhdr": "NRRD0004\ntype: float\ndimension: 3\nsizes: 48 40 8\nencoding: raw\nendian: little\ndata file: {}",
}
SLICES = [f"s{number}.raw" for number in range(8)]


@pytest.mark.parametrize("data_files", ["s%d.raw 0 7 1", "\n".join(["LIST", *SLICES])], ids=["pattern", "list"])
@pytest.mark.parametrize("header", HEADERS)
def test_each_data_file_of_a_header_belongs_to_the_image(target, tmp_path, header, data_files):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, voxels in zip(SLICES, VOLUME, strict=True):
        (folder / name).write_bytes(voxels.tobytes())
    (folder / header).write_text(HEADERS[header].format(data_files) + "\n")
    source = source_in(folder, header[6:], SimpleITKIO)
    assert [name for name, *_ in source.cases["a"].fingerprint] == [header, *SLICES] and not source.ignored_files
    np.testing.assert_array_equal(read_case(target, source.cases["a"], SimpleITKIO)[0][0], VOLUME)


@pytest.mark.parametrize(
    ("name", "other"), [("a_0000.mhd", "b.raw"), ("a_0000.nhdr", "b.raw"), ("a_0000.hdr", "a_0000.img")]
)
def test_a_missing_data_file_is_named(target, tmp_path, name, other):
    (tmp_path / name).write_text(HEADERS.get(name, "").format(other))
    with pytest.raises(UnusableImageError, match=f"{tmp_path / other} is missing"):
        read_case(target, CaseFiles([str(tmp_path / name)], None, 1, []), SimpleITKIO)


@pytest.mark.parametrize(("written", "named"), [("a_0000.nii.gz", "a_0000.Nii.gz"), ("a_0000.mha", "a_0000.MHA")])
def test_an_ending_that_the_reader_does_not_know_is_explained(target, tmp_path, written, named):
    write(tmp_path / written)
    (tmp_path / written).rename(tmp_path / named)
    with pytest.raises(UnusableImageError) as error:
        read_case(target, CaseFiles([str(tmp_path / named)], None, 1, []), SimpleITKIO)
    subprocess.run(str(error.value).partition("Type: ")[2], shell=True, check=True)
    assert read_case(target, CaseFiles([str(tmp_path / written)], None, 1, []), SimpleITKIO)[0].shape == (
        1,
        *VOLUME.shape,
    )


def test_names_that_the_locale_cannot_read_are_not_called_damaged(monkeypatch):
    name = os.fsdecode(b"/nowhere/M\xfcller_0000.nii.gz")
    assert "not in UTF-8" in RawFile.inspect(name).problem
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(UserError, match=r"export PYTHONUTF8=1$"):
        RawFile.inspect(name)


def test_both_endings_of_a_format_are_read(target, workspace):
    folder = workspace.raw / DATASET / "imagesUn"
    write(folder / "plain_0000.nii")
    write(folder / "Upper_0000.nii")
    (folder / "Upper_0000.nii").rename(folder / "Upper_0000.NII")
    # Of two files of one image, the one with the planned ending is used, and the other is reported.
    write(folder / "case_005_0000.nii")
    (source,) = find_sources(target, [])
    assert source.cases["plain"].files == [str(folder / "plain_0000.nii")] and "Upper" in source.cases
    assert source.cases["case_005"].files == [str(folder / "case_005_0000.nii.gz")]
    assert source.ignored_files == ["imagesUn/case_005_0000.nii"]
    for reader in (SimpleITKIO, NibabelIO):
        assert read_case(target, source.cases["plain"], reader)[0].shape == (1, *VOLUME.shape)
    done = preprocessing.preprocess_unlabelled(target, [], processes=1)
    assert {"plain", "Upper"} < {case.name for case in done.cases}


def test_a_file_with_the_other_ending_of_its_format_is_explained(target, tmp_path):
    for written, named in (("a.nii", "a_0000.nii.gz"), ("b.nii.gz", "b_0000.nii")):
        write(tmp_path / written)
        (tmp_path / written).rename(tmp_path / named)
        renamed = tmp_path / f"{named[0]}_0000{written[1:]}"
        with pytest.raises(UnusableImageError, match=f"Rename it to {renamed}"):
            read_case(target, CaseFiles([str(tmp_path / named)], None, 1, []), SimpleITKIO)
        (tmp_path / named).rename(renamed)
        assert read_case(target, CaseFiles([str(renamed)], None, 1, []), SimpleITKIO)[0].shape == (1, *VOLUME.shape)


def test_advice_for_another_format_is_a_command_that_converts(target, workspace):
    folder = workspace.raw / DATASET / "imagesUn"
    for name, converts in (("a.nii", False), ("a.nii.gz", False), ("a_0000.nrrd", True), ("it's b_0000.mha", True)):
        shutil.rmtree(folder)
        folder.mkdir()
        write(folder / name)
        with pytest.raises(UserError, match=rf"CASE_0000\.nii\.gz.*{name}") as error:
            find_sources(target, [])
        found = re.search(r'python (-c ".*" .* CASE_0000\.nii\.gz)', str(error.value))
        assert bool(found) == converts
    subprocess.run(["bash", "-c", f"{sys.executable} {found[1]}"], cwd=folder, check=True)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "CASE_0000.nii.gz"))), VOLUME)


def test_a_single_slice_is_no_volume(tmp_path):
    def flat(name, array):
        write(tmp_path / name, array)
        return single_slice_problem(Volumes, CaseFiles([str(tmp_path / name)], None, 1, []))

    assert "40" in flat("scout.nii.gz", VOLUME[0]) and "single slice" in flat("scout.mha", VOLUME[0])
    for axis in range(3):
        assert "single slice" in flat(f"axis{axis}.nii.gz", VOLUME.take([0], axis))
    assert flat("two.nii.gz", VOLUME[:2]) is None and flat("volume.nrrd", VOLUME) is None
    colours = np.stack([VOLUME] * 3, axis=-1).astype(np.uint8)
    for name, array, is_single_slice in (
        ("flat.tif", VOLUME[0], True),
        ("one.tif", VOLUME[:1], True),
        ("many.tif", VOLUME, False),
        ("colour.tif", colours[0], True),
        ("colours.tif", colours, False),
    ):
        tifffile.imwrite(tmp_path / name, array, photometric="rgb" if "colour" in name else None)
        assert (
            single_slice_problem(Volumes, CaseFiles([str(tmp_path / name)], None, 1, [])) is not None
        ) == is_single_slice
    # A header without a size is damaged.
    write(tmp_path / "nothing.nii")
    content = (tmp_path / "nothing.nii").read_bytes()
    (tmp_path / "nothing.nii").write_bytes(content[:40] + bytes(16) + content[56:])
    assert single_slice_problem(Volumes, CaseFiles([str(tmp_path / "nothing.nii")], None, 1, [])) is None
    # An image that cannot be read is reported when it is read.
    (tmp_path / "broken.nii.gz").write_bytes(b"")
    assert single_slice_problem(Volumes, CaseFiles([str(tmp_path / "broken.nii.gz")], None, 1, [])) is None


def test_a_slice_of_another_orientation_than_the_plan_s_is_left_out(tmp_path):
    """nnU-Net would repeat a line of it into a slice."""
    slices = SimpleNamespace(name="2d", patch_size=(32, 32), plans_manager=SimpleNamespace(transpose_forward=[2, 0, 1]))

    def flat(name, array):
        write(tmp_path / name, array)
        return single_slice_problem(slices, CaseFiles([str(tmp_path / name)], None, 1, []))

    for ending in (".nii.gz", ".mha"):
        assert "orientation" in flat(f"axial{ending}", VOLUME[0]) and "orientation" in flat(f"one{ending}", VOLUME[:1])
        assert flat(f"sagittal{ending}", VOLUME[..., :1]) is None and flat(f"volume{ending}", VOLUME) is None


def test_single_slices_among_volumes_are_left_out(target, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preprocessing, "_configuration", Volumes, raising=False)
    write(tmp_path / "scout.nii.gz", VOLUME[0])
    reason, is_single_slice = preprocessing._preprocess_case(
        CaseFiles([str(tmp_path / "scout.nii.gz")], None, 1, []), SimpleITKIO, tmp_path / "out", {}
    )
    assert is_single_slice and str(tmp_path / "scout.nii.gz") in reason and not (tmp_path / "out.b2nd").exists()
    # A 2D network can use a single slice.
    assert single_slice_problem(target, CaseFiles([str(tmp_path / "scout.nii.gz")], None, 1, [])) is None


@pytest.mark.slow
def test_the_doctor_accepts_what_the_run_accepts(target, workspace):
    """Images are compressed in parts, followed by other bytes, constant, labelled cases, masks, or hold NaN."""
    folder = workspace.raw / DATASET / "imagesUn"
    write(workspace.folder / "plain.nii")
    plain = (workspace.folder / "plain.nii").read_bytes()
    (folder / "parts_0000.nii.gz").write_bytes(
        b"".join(gzip.compress(plain[start : start + 20000]) for start in range(0, len(plain), 20000))
    )
    (folder / "padded_0000.nii.gz").write_bytes(gzip.compress(plain + bytes(512)))
    (folder / "case_000_0000.nii.gz").write_bytes(b"broken")  # never read: it counts as the labelled case of its name
    sources = preprocessing.sources_in_use(target, [])
    result = readable(target, sources, "cpu", skip_unreadable=False)
    assert result.status == doctor.OK and result.values["skipped"] == 0, result
    assert len(preprocessing.preprocess_unlabelled(target, [], processes=1).cases) == 6
    write(folder / "nan_0000.nii.gz", np.where(VOLUME > 130, np.nan, VOLUME).astype(np.float32))
    write(folder / "constant_0000.nii.gz", np.full_like(VOLUME, 3))
    box = np.zeros_like(VOLUME)
    box[2:6, 10:30, 10:30] = 1  # a mask: after nnU-Net's cropping, it is constant
    write(folder / "mask_0000.nii.gz", box)
    write(folder / "huge_0000.nii.gz", VOLUME * 1e30)
    sources = preprocessing.sources_in_use(target, [])
    result = readable(target, sources, "cpu", skip_unreadable=False)
    assert result.status == doctor.PROBLEM and result.values == {"files": 10, "skipped": 4, "read": 4}
    assert result.fix.endswith("nnUNetv2_train_macl_pretrain 901 -c 2d -device cpu --skip_unreadable")
    skipped = preprocessing.preprocess_unlabelled(target, [], processes=1, skip_unreadable=True).skipped
    assert {path.name for path in skipped} == {"nan", "constant", "mask", "huge"}


def test_channels_that_do_not_fit_each_other_are_explained(target, tmp_path):
    write(tmp_path / "a_0000.nii.gz")
    write(tmp_path / "a_0001.nii.gz", VOLUME[:, :20])
    case = CaseFiles([str(tmp_path / f"a_000{channel}.nii.gz") for channel in (0, 1)], None, 1, [])
    with pytest.raises(UnusableImageError, match="Not all input images have the same shape"):
        read_case(target, case, SimpleITKIO)
