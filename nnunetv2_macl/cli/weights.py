"""Weights: what they would give, for others, from others, what they are."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunetv2_macl.cli.messages import run

_WEIGHTS = (
    "a pre-training run's folder, a file in it, a checkpoint of nnU-Net (checkpoint_final.pth) or of nnssl, or a file that the "
    "MACL authors published, such as MACL_CHD.pth"
)


def transfer_entry() -> None:
    """``nnUNetv2_macl_transfer``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_transfer",
        description="Show which pre-trained weights the fine-tuning of DATASET would take, and why not the others.",
        epilog="Example: nnUNetv2_macl_transfer macl_encoder.pth 27 -c 3d_fullres, then "
        "nnUNet_macl_weights=macl_encoder.pth nnUNetv2_train 27 3d_fullres 0 -tr nnUNetTrainerMACL",
    )
    parser.add_argument("weights", help=_WEIGHTS)
    parser.add_argument("dataset_name_or_id", help="data set to fine-tune on, by name or id")
    parser.add_argument(
        "-c",
        dest="configuration",
        help="nnU-Net configuration. Default: the first of 3d_fullres, 3d_lowres, 2d in the plan",
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans identifier. Default: nnUNetPlans")
    arguments = parser.parse_args()

    from nnunetv2_macl.training.finetune import show_transfer

    run(
        lambda: show_transfer(
            Path(arguments.weights), arguments.dataset_name_or_id, arguments.plans, arguments.configuration
        )
    )


def export_entry() -> None:
    """``nnUNetv2_macl_export``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_export",
        description="Write pre-trained weights for others, or in a format that others fine-tune from.",
        epilog="Examples: nnUNetv2_macl_export RUN_FOLDER -o weights.zip; "
        "nnUNetv2_macl_export macl_encoder.pth -o for_nnunet.pth --format nnunet",
    )
    parser.add_argument("weights", help=_WEIGHTS)
    parser.add_argument("-o", dest="output", required=True, help="file to write")
    parser.add_argument(
        "--format",
        help="zip: one file for others, for nnUNetv2_macl_install (default where the file ends in .zip); "
        "nnunet: for nnUNetv2_train -pretrained_weights; "
        "nnssl: for nnUNetv2_preprocess_like_nnssl and nnUNetv2_train_pretrained of nnU-Net's master branch",
    )
    parser.add_argument("--license", default="unknown", help="for the model card in a zip, as hubs write it: cc-by-4.0")
    arguments = parser.parse_args()

    from nnunetv2_macl.formats import export

    run(
        lambda: export(
            Path(arguments.weights).expanduser(),
            Path(arguments.output).expanduser(),
            arguments.format,
            arguments.license,
        )
    )


def install_entry() -> None:
    """``nnUNetv2_macl_install``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_install",
        description="Put weights that others share where nnUNetTrainerMACL finds them. Nothing is overwritten.",
        epilog="Example: nnUNetv2_macl_install weights.zip",
    )
    parser.add_argument("file", help="that nnUNetv2_macl_export wrote")
    file = Path(parser.parse_args().file).expanduser()

    def action() -> None:
        from nnunetv2_macl.nnunet import require_folders
        from nnunetv2_macl.sharing.install import install

        require_folders()
        install(file, Path(os.environ["nnUNet_results"]))

    run(action)


def inspect_entry() -> None:
    """``nnUNetv2_macl_inspect``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_inspect",
        description="Say what a file is, what it was trained on and how, and whether it is whole.",
        epilog="Example: nnUNetv2_macl_inspect macl_encoder.pth",
    )
    parser.add_argument(
        "file",
        help="a checkpoint, exported weights, a MACL plan or a package (.zip) of this project, a checkpoint of nnU-Net or of "
        "nnssl, or a file that the MACL authors published",
    )
    file = Path(parser.parse_args().file).expanduser()

    from nnunetv2_macl.sharing.inspect import inspect

    run(lambda: print(inspect(file)))
