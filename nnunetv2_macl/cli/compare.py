"""The command ``nnUNetv2_macl_compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import run


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_compare",
        description="Measure whether pre-training helps on DATASET. The study fine-tunes with few labels, from scratch and "
        "from pre-trained weights, on the same cases with the same number of steps. It compares the results on cases that "
        "neither has seen. nnU-Net's own folders are only read. Start the command again to continue a study. Start it "
        "several times to run several trainings of a study at once.",
        epilog="Example: nnUNetv2_macl_compare 4 -c 2d --labels 5 10 20 --seeds 3. To use several GPUs, start the same "
        "command once for each GPU, each with its own CUDA_VISIBLE_DEVICES.",
    )
    add = parser.add_argument
    add(
        "dataset",
        metavar="DATASET",
        help="raw data set, by name or id. Its folder imagesUn holds the unlabelled images",
    )
    add("-c", dest="configuration", required=True, metavar="CONFIGURATION", help="nnU-Net configuration")
    add(
        "-p",
        dest="plans",
        default="nnUNetPlans",
        metavar="PLANS",
        help="plans identifier. The study makes this plan itself. Default: nnUNetPlans",
    )
    add(
        "--plan",
        metavar="FILE",
        help="plan to use unchanged, for example one that you edited. Default: the study makes its own plan",
    )
    add(
        "--arms",
        nargs="+",
        default=["scratch", "encoder", "pretrained"],
        metavar="ARM",
        help="what to compare: scratch; pretrained (encoder and decoder, default recipe); encoder (only the encoder of these "
        "weights); recipe:NAME_OR_FILE (pre-trained with this recipe); recipe:NAME_OR_FILE,KEY=VALUE,... (with other values "
        "of recipe keys, as --set of nnUNetv2_train_macl_pretrain); weights:FILE (weights that exist already); semi:ARM (one "
        "of these, fine-tuned on unlabelled images too); semi,KEY=VALUE,...:ARM (with other settings); self_train:ARM "
        "(trained on the labels that the models of ARM give to the unlabelled images). "
        "Default: scratch encoder pretrained",
    )
    amount = "cases, or a fraction (0.1 or 10%%) of all cases"
    add(
        "--labels",
        nargs="+",
        default=["5", "10", "20"],
        metavar="N",
        help="numbers of labelled cases to fine-tune with, or fractions (0.1 or 10%%) of the cases that are not kept for test "
        "and validation. Default: 5 10 20",
    )
    add("--seeds", type=int, default=3, help="number of random draws of the labelled cases. Default: 3")
    add(
        "--splits",
        type=int,
        default=1,
        metavar="N",
        help="number of random splits into test, validation and training patients; the whole study runs on each. Default: 1",
    )
    add(
        "--rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="learning rates of every kind of fine-tuning; each arm uses its best one on the validation cases. Default: 3e-3 for "
        "adamw, 1e-2 and 1e-3 for sgd, 5e-4 for paper",
    )
    add(
        "--finetuning",
        nargs="+",
        choices=["adamw", "sgd", "paper"],
        default=["adamw", "sgd"],
        help="kinds of fine-tuning, which share the pre-trainings. adamw: as nnUNetTrainerMACL_short, 800 steps with AdamW. "
        "sgd: as nnU-Net trains, 25,000 steps. paper: with loss, optimiser and schedule of the paper. Default: adamw sgd",
    )
    add("--test", default="25%", metavar="N", help=f"number of test {amount}. Default: 25%%")
    add(
        "--validation",
        default="10%",
        metavar="N",
        help=f"number of validation {amount}, for the choice of the learning rate and for curves. Default: 10%%",
    )
    add(
        "--group_regex",
        metavar="REGEX",
        help="regular expression that finds the patient in the name of a case. Cases of one patient stay on the same side of "
        "each split. Default: each case is a patient",
    )
    for key, what, default in (
        ("epochs", "epochs", "8, 100 and 100"),
        ("iterations", "steps per epoch", "100, 250 and 250"),
    ):
        add(
            f"--{key}",
            nargs="+",
            type=int,
            metavar="N",
            help=f"{what} of fine-tuning, one number, or one for each kind. Default: {default} for adamw, sgd and paper",
        )
    add("-batch_size", type=int, help="batch size of fine-tuning. Default: nnU-Net's")
    for key, what in (("epochs", "epochs"), ("iterations", "steps per epoch"), ("batch_size", "batch size")):
        add(f"--pretrain_{key}", type=int, metavar="N", help=f"{what} of pre-training. Default: the recipe's")
    add("--disable_tta", action="store_true", help="predict without mirroring: faster, a little worse")
    add("-o", dest="folder", type=Path, metavar="FOLDER", help="folder of the study. Default: ./macl_compare_DATASET_C")
    add("-device", default="cuda", help="cuda, cpu or mps. Default: cuda")
    add("-np", dest="processes", type=int, default=8, help="processes for preprocessing and export. Default: 8")
    add("--jobs", type=int, default=1, help="number of trainings that run at the same time. Default: 1")
    add(
        "--skip_unreadable",
        action="store_true",
        help="leave out unlabelled images that cannot be used, instead of stopping",
    )
    add("--dry_run", action="store_true", help="show the split and the trainings, and stop")
    return parser


def compare_entry() -> None:
    """Run ``nnUNetv2_macl_compare``."""
    arguments = vars(_compare_parser().parse_args())

    def action() -> None:
        from nnunetv2_macl.compare.run import compare
        from nnunetv2_macl.compare.study import options_by_finetuning

        how = {
            key: arguments.pop(key)
            for key in ("splits", "folder", "device", "processes", "jobs", "dry_run", "skip_unreadable")
        }
        compare(options_by_finetuning(arguments.pop("finetuning"), **arguments), **how)

    run(action)
