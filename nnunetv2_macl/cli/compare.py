"""``nnUNetv2_macl_compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import run


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_compare",
        description="Show whether pre-training helps on DATASET: fine-tune with few labels from scratch and from pre-trained "
        "weights, on the same cases with the same budget, and compare on cases that neither has seen. nnU-Net's own folders "
        "are only read. Started again, the study goes on; started several times, the cells are shared out.",
        epilog="Example: nnUNetv2_macl_compare 4 -c 2d --labels 5 10 20 --seeds 3. On several GPUs: the same command once a "
        "GPU, each with its own CUDA_VISIBLE_DEVICES.",
    )
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="raw data set, by name or id. Unlabelled images lie in its imagesUn")
    add("-c", dest="configuration", required=True, metavar="CONFIGURATION", help="nnU-Net configuration")
    add(
        "-p",
        dest="plans",
        default="nnUNetPlans",
        metavar="PLANS",
        help="plans identifier; planned anew. Default: nnUNetPlans",
    )
    add(
        "--plan",
        metavar="FILE",
        help="a plan to take as it stands, edited by hand for example, instead of planning anew",
    )
    add(
        "--arms",
        nargs="+",
        default=["scratch", "encoder", "pretrained"],
        metavar="ARM",
        help="scratch; pretrained (encoder and decoder, by the default recipe); encoder (of that, the encoder alone); "
        "recipe:NAME_OR_FILE (pre-trained with it); recipe:NAME_OR_FILE,KEY=VALUE,... (with other values of its keys, as --set "
        "of nnUNetv2_train_macl_pretrain); weights:FILE (that are there already); semi:ARM (one of "
        "these, trained on unlabelled images too); semi,KEY=VALUE,...:ARM (with other settings); self_train:ARM (trained "
        "on the labels that the models of ARM give to the unlabelled images). "
        "Default: scratch encoder pretrained",
    )
    amount = "cases, or a fraction (0.1 or 10%%) of all"
    add(
        "--labels",
        nargs="+",
        default=["5", "10", "20"],
        metavar="N",
        help="labelled cases, or a fraction (0.1 or 10%%) of those not kept for test and validation. Default: 5 10 20",
    )
    add("--seeds", type=int, default=3, help="draws of labelled cases, each trained on. Default: 3")
    add(
        "--splits",
        type=int,
        default=1,
        metavar="N",
        help="random draws of test, validation and training patients; the whole study runs on each. Default: 1",
    )
    add(
        "--rates",
        nargs="+",
        type=float,
        default=[1e-2, 1e-3],
        metavar="RATE",
        help="learning rates of fine-tuning; each arm gets its best on the validation cases. Default: 1e-2 1e-3",
    )
    add(
        "--finetuning",
        choices=["sgd", "adamw", "paper"],
        default="sgd",
        help="sgd: as nnU-Net trains; adamw: the same with AdamW, which wants --rates 1e-3 3e-3 and gets further in a short "
        "training; paper: as the paper fine-tunes, which wants --rates 5e-4. Default: sgd",
    )
    add("--test", default="25%", metavar="N", help=f"test {amount}. Default: 25%%")
    add("--validation", default="10%", metavar="N", help=f"validation {amount}, for the rate and curves. Default: 10%%")
    add(
        "--group_regex",
        metavar="REGEX",
        help="what of a case's name is the patient, who stays on one side of each split. Default: each case its own",
    )
    add("--epochs", type=int, default=100, help="of fine-tuning. Default: 100")
    add("--iterations", type=int, default=250, help="of fine-tuning, an epoch. Default: 250")
    add("-batch_size", type=int, help="of fine-tuning. Default: nnU-Net's")
    for key in ("epochs", "iterations", "batch_size"):
        add(f"--pretrain_{key}", type=int, metavar="N", help="of pre-training. Default: the recipe's")
    add("--disable_tta", action="store_true", help="predict without mirroring: faster, a little worse")
    add("-o", dest="folder", type=Path, metavar="FOLDER", help="of the study. Default: ./macl_compare_DATASET_C")
    add("-device", default="cuda", help="cuda, cpu or mps. Default: cuda")
    add("-np", dest="processes", type=int, default=8, help="processes for preprocessing and export. Default: 8")
    add("--jobs", type=int, default=1, help="cells at a time. Default: 1")
    add(
        "--skip_unreadable",
        action="store_true",
        help="leave out unlabelled images that cannot be used, instead of stopping",
    )
    add("--dry_run", action="store_true", help="show split and cells, and stop")
    return parser


def compare_entry() -> None:
    """``nnUNetv2_macl_compare``."""
    arguments = vars(_compare_parser().parse_args())

    def action() -> None:
        from nnunetv2_macl.compare.run import compare
        from nnunetv2_macl.compare.study import Options

        how = {
            key: arguments.pop(key)
            for key in ("splits", "folder", "device", "processes", "jobs", "dry_run", "skip_unreadable")
        }
        compare(Options(**arguments), **how)

    run(action)
