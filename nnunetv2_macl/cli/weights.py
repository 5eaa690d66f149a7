"""The commands that preview, export, install and inspect weights."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunetv2_macl.cli.messages import call, run

_WEIGHTS = (
    "the folder of a pre-training run, a file in it, a checkpoint of nnU-Net (checkpoint_final.pth) or nnssl, or a file that "
    "the MACL authors published, such as MACL_CHD.pth"
)


def transfer_entry() -> None:
    """Run ``nnUNetv2_macl_transfer``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_transfer",
        description="Show which pre-trained weights fine-tuning on DATASET would load, and why it would not load the others.",
        epilog="Example: nnUNetv2_macl_transfer macl_encoder.pth 27 -c 3d_fullres, then "
        "nnUNet_macl_weights=macl_encoder.pth nnUNetv2_train 27 3d_fullres 0 -tr nnUNetTrainerMACL",
    )
    parser.add_argument("weights", type=Path, help=_WEIGHTS)
    parser.add_argument("dataset", metavar="dataset_name_or_id", help="data set to fine-tune on, by name or id")
    parser.add_argument(
        "-c",
        dest="configuration",
        help="nnU-Net configuration. Default: the first of 3d_fullres, 3d_lowres, 2d in the plan",
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans identifier. Default: nnUNetPlans")
    call(parser, "training.initial_weights:show_transfer")


def export_entry() -> None:
    """Run ``nnUNetv2_macl_export``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_export",
        description="Write pre-trained weights as one file to share, or in the format of nnU-Net or nnssl.",
        epilog="Examples: nnUNetv2_macl_export RUN_FOLDER -o weights.zip; "
        "nnUNetv2_macl_export macl_encoder.pth -o for_nnunet.pth --format nnunet",
    )
    parser.add_argument("source", metavar="weights", type=Path, help=_WEIGHTS)
    parser.add_argument("-o", dest="file", metavar="OUTPUT", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--format",
        dest="name",
        metavar="FORMAT",
        help="zip: one file to share, for nnUNetv2_macl_install (default if the name of the file ends in .zip); "
        "nnunet: for nnUNetv2_train -pretrained_weights; "
        "nnssl: for nnUNetv2_preprocess_like_nnssl and nnUNetv2_train_pretrained of nnU-Net's master branch",
    )
    parser.add_argument(
        "--license",
        dest="license_id",
        metavar="LICENSE",
        default="unknown",
        help="licence that a zip states, such as cc-by-4.0. Default: unknown",
    )
    call(parser, "formats:export")


def install_entry() -> None:
    """Run ``nnUNetv2_macl_install``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_install",
        description="Install weights that others have shared, so that nnUNetTrainerMACL finds them. Nothing is overwritten.",
        epilog="Example: nnUNetv2_macl_install weights.zip",
    )
    parser.add_argument("file", help="zip file that nnUNetv2_macl_export wrote")
    file = Path(parser.parse_args().file).expanduser()

    def action() -> None:
        from nnunetv2_macl.nnunet import require_folders
        from nnunetv2_macl.sharing.install import install

        require_folders()
        install(file, Path(os.environ["nnUNet_results"]))

    run(action)


def inspect_entry() -> None:
    """Run ``nnUNetv2_macl_inspect``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_inspect",
        description="Show what a file is, on which data and how it was trained, and whether it is damaged.",
        epilog="Example: nnUNetv2_macl_inspect macl_encoder.pth",
    )
    parser.add_argument(
        "file",
        help="a checkpoint, exported weights, a MACL plan or a package (.zip) of nnunetv2_macl, a checkpoint of nnU-Net or "
        "nnssl, or a file that the MACL authors published",
    )
    file = Path(parser.parse_args().file).expanduser()

    from nnunetv2_macl.sharing.inspect import inspect

    run(lambda: print(inspect(file)))
