"""The commands ``nnUNetv2_macl_collect`` and ``nnUNetv2_macl_convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import call, run


def collect_entry() -> None:
    """Run ``nnUNetv2_macl_collect``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_collect",
        description="Collect the DICOM series and NIfTI files in a folder and its subfolders as the unlabelled images "
        "(imagesUn) of an nnU-Net raw data set, one image for each series. File names contain pseudonyms instead of patient "
        "names. Localizers, single slices, derived and duplicate series are left out. Start the command again to continue, or "
        "to add new images.",
        epilog="Example: nnUNetv2_macl_collect /data/export -d 28 --modality MR",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE_FOLDER", type=Path, help="folder to search; it is only read")
    add(
        "-d",
        dest="dataset",
        required=True,
        metavar="ID",
        help="raw data set with one channel, by id or name. It is created if it does not exist",
    )
    add(
        "--modality", type=str.upper, help="DICOM modality to take: CT, MR, PT, ... Default: the only one that is found"
    )
    add("--min_slices", type=int, default=5, metavar="N", help="leave out series with fewer slices. Default: 5")
    add(
        "--keep_derived",
        action="store_true",
        help="take derived and secondary series too (reformatted, recompressed, ...)",
    )
    add(
        "--patient_regex",
        metavar="REGEX",
        help="regular expression that finds the patient in the path of a NIfTI file below SOURCE_FOLDER. Default: the first "
        "folder of this path, or the file name",
    )
    add("--link", action="store_true", help="make hard links to NIfTI files instead of copies; needs the same disk")
    add(
        "--private_folder",
        type=Path,
        default="~/nnunetv2_macl_private",
        metavar="FOLDER",
        help="folder for the key of the pseudonyms and the table of images and their sources. Default: "
        "~/nnunetv2_macl_private",
    )
    add(
        "-np",
        dest="processes",
        type=int,
        default=8,
        help="number of images that are processed at the same time. Default: 8",
    )
    call(parser, "collecting.collect:collect")


def convert_entry() -> None:
    """Run ``nnUNetv2_macl_convert``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_convert",
        description="Convert a data set of the MACL paper from its original layout to nnU-Net's raw format. nnU-Net itself "
        "converts ACDC, BraTS, KiTS and the Decathlon.",
        epilog="Example: nnUNetv2_macl_convert mmwhs 'MM-WHS 2017 Dataset' -d 31",
    )
    add = parser.add_argument
    add("name", choices=["mmwhs", "hvsmr", "chaos", "isic2018", "imagechd"], help="data set to convert")
    add("source", metavar="SOURCE", type=Path, help="folder of the unpacked data set; it is only read")
    add("-d", dest="dataset", required=True, metavar="ID", help="id or name of the raw data set to create")
    add("--modality", choices=["ct", "mr"], help="mmwhs: CT or MR images. Default: ct")
    add(
        "--sequences",
        nargs="+",
        choices=["t2spir", "t1in", "t1out"],
        help="chaos: MR sequences; each becomes a case. Default: t2spir",
    )
    add(
        "--grey",
        action="store_true",
        default=None,
        help="isic2018: convert to one grey channel, as in the paper. Default: the channels R, G, B",
    )
    add("--labelled", action="store_true", default=None, help="imagechd: keep the labels. Default: unlabelled images")
    arguments = vars(parser.parse_args())
    name, source, dataset = arguments.pop("name"), arguments.pop("source").expanduser(), arguments.pop("dataset")
    options = {key: value for key, value in arguments.items() if value is not None}
    own = {"mmwhs": "modality", "chaos": "sequences", "isic2018": "grey", "imagechd": "labelled"}.get(name)
    if others := sorted(options.keys() - {own}):
        parser.error(f"--{others[0]} is not an option of {name}")

    from nnunetv2_macl import converting

    run(lambda: converting.convert(getattr(converting, name)(source, **options), dataset))
