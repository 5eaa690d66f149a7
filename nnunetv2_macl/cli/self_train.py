"""The command ``nnUNetv2_macl_self_train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import call


def self_train_entry() -> None:
    """Run ``nnUNetv2_macl_self_train``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_self_train",
        description="Self-training: a trained model labels the unlabelled images of DATASET, and nnU-Net trains a new model on "
        "these images and on the labelled images. No image of a validation case is used. Start the command again to continue.",
        epilog="Example: nnUNetv2_train 27 2d 0 -tr nnUNetTrainerMACL, then nnUNetv2_macl_self_train 27 -c 2d -f 0, then "
        "nnUNetv2_predict ... -tr nnUNetTrainerMACLSelfTraining",
    )
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="data set, by name or id")
    add("-c", dest="configuration", required=True, metavar="CONFIGURATION", help="nnU-Net configuration")
    add("-f", dest="fold", required=True, metavar="FOLD", help="fold, 0 to 4, or all")
    add("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="plans identifier. Default: nnUNetPlans")
    add(
        "-tr",
        dest="teacher",
        metavar="TRAINER",
        help="trainer of the model that labels the images. It must be trained. Default: the variable "
        "nnUNet_macl_teacher, or else nnUNetTrainerMACL",
    )
    add(
        "--rounds",
        type=int,
        choices=(1, 2, 3),
        default=1,
        help="number of models to train. Each model is trained on the labels of the model before it. Default: 1",
    )
    add(
        "--export_labels",
        type=Path,
        metavar="FOLDER",
        help="also write the labels of the unlabelled images to FOLDER, in the format of the data set, before the last training, "
        "so that you can correct them. Files in FOLDER are kept",
    )
    add("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="cuda, cpu or mps. Default: cuda")
    call(parser, "semi_supervised.rounds:self_train")
