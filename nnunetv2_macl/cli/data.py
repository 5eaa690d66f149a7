"""``nnUNetv2_macl_collect`` and ``nnUNetv2_macl_convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import run


def collect_entry() -> None:
    """``nnUNetv2_macl_collect``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_collect",
        description="Turn a tree of DICOM series and NIfTI files into imagesUn of a nnU-Net raw data set, one image for each "
        "series. File names hold pseudonyms instead of names. Localizers, single slices, derived and duplicate series are left "
        "out. Start it again to continue, or to add what is new in the tree.",
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
        help="what of the path of a NIfTI file below SOURCE_FOLDER is the patient. Default: its first folder, or the file",
    )
    add("--link", action="store_true", help="hard links to NIfTI files instead of copies; needs the same disk")
    add(
        "--private_folder",
        default="~/nnunetv2_macl_private",
        metavar="FOLDER",
        help="where the key of the pseudonyms and the table of images and sources are. Default: ~/nnunetv2_macl_private",
    )
    add("-np", dest="processes", type=int, default=8, help="images at a time. Default: 8")
    arguments = vars(parser.parse_args())

    def action() -> None:
        from nnunetv2_macl.collecting.collect import collect

        source, private_folder = Path(arguments.pop("source")), Path(arguments.pop("private_folder"))
        collect(source, arguments.pop("dataset"), private_folder=private_folder, **arguments)

    run(action)
