"""``nnUNetv2_macl_collect`` and ``nnUNetv2_macl_convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import run


def collect_entry() -> None:
    """``nnUNetv2_macl_collect``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_collect",
        description="Turn a tree of DICOM series and NIfTI files into imagesUn of a nnU-Net raw data set, one image for "
        "each series. File names hold pseudonyms instead of names. Localizers, single slices, derived and duplicate "
        "series are left out. Start it again to continue, or to add what is new in the tree.",
        epilog="Example: nnUNetv2_macl_collect /data/export -d 28 --modality MR",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE_FOLDER", help="folder of the tree; it is only read")
    add(
        "-d",
        dest="dataset",
        required=True,
        metavar="ID",
        help="raw data set of one channel, by number or name; made if new",
    )
    add("--modality", type=str.upper, help="DICOM modality to take: CT, MR, PT, ... Default: the only one in the tree")
    add("--min_slices", type=int, default=5, metavar="N", help="leave out series of fewer slices. Default: 5")
    add(
        "--keep_derived",
        action="store_true",
        help="take derived and secondary series too (reformatted, recompressed, ...)",
    )
    add(
        "--patient_regex",
        metavar="REGEX",
        help="what of the path of a NIfTI file below SOURCE_FOLDER is the patient. Default: first folder, or the file",
    )
    add("--link", action="store_true", help="hard links to NIfTI files instead of copies; needs the same disk")
    add(
        "--private_folder",
        default="~/nnunetv2_macl_private",
        metavar="FOLDER",
        help="for the key of the pseudonyms and the table of images and sources. Default: ~/nnunetv2_macl_private",
    )
    add("-np", dest="processes", type=int, default=8, help="images at a time. Default: 8")
    arguments = vars(parser.parse_args())

    def action() -> None:
        from nnunetv2_macl.collecting.collect import collect

        source, private_folder = Path(arguments.pop("source")), Path(arguments.pop("private_folder"))
        collect(source, arguments.pop("dataset"), private_folder=private_folder, **arguments)

    run(action)


def convert_entry() -> None:
    """``nnUNetv2_macl_convert``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_convert",
        description="Convert a data set of the paper from the layout of its organisers to nnU-Net's raw format. nnU-Net "
        "itself converts ACDC, BraTS, KiTS and the Decathlon.",
        epilog="Example: nnUNetv2_macl_convert mmwhs 'MM-WHS 2017 Dataset' -d 31",
    )
    add = parser.add_argument
    add("name", choices=["mmwhs", "hvsmr", "chaos", "isic2018", "imagechd"], help="the data set")
    add("source", metavar="SOURCE", help="folder of the unpacked data set; it is only read")
    add("-d", dest="dataset", required=True, metavar="ID", help="number or name of the raw data set to make")
    add("--modality", choices=["ct", "mr"], help="mmwhs: which of its two sets. Default: ct")
    add("--sequences", nargs="+", choices=["t2spir", "t1in", "t1out"], help="chaos: each a case. Default: t2spir")
    add(
        "--grey",
        action="store_true",
        default=None,
        help="isic2018: one grey channel, as in the paper, instead of R, G, B",
    )
    add("--labelled", action="store_true", default=None, help="imagechd: with labels, instead of as unlabelled images")
    arguments = vars(parser.parse_args())
    name, source, dataset = arguments.pop("name"), Path(arguments.pop("source")).expanduser(), arguments.pop("dataset")
    options = {key: value for key, value in arguments.items() if value is not None}
    own = {"mmwhs": "modality", "chaos": "sequences", "isic2018": "grey", "imagechd": "labelled"}.get(name)
    if others := sorted(options.keys() - {own}):
        parser.error(f"--{others[0]} is not an option of {name}")

    from nnunetv2_macl import converting

    run(lambda: converting.convert(getattr(converting, name)(source, **options), dataset))
