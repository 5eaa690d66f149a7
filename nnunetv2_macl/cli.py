"""Command lines: arguments in, messages out; what is done lies elsewhere."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.resources import resource_folder


def _run(action: Callable[[], object]) -> None:
    """Show the user his mistakes as sentences, with exit code 1."""
    logger = logging.getLogger("nnunetv2_macl")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        action()
    except (UserError, NotImplementedError) as error:
        sys.exit(f"\nError: {error}")
    finally:
        logger.removeHandler(handler)


def _pretrain_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_train_macl_pretrain",
        description="Pre-train encoder and partial decoder of DATASET's own nnU-Net on unlabelled images (MACL).",
        epilog="Example: nnUNetv2_train_macl_pretrain 4 -c 2d, then nnUNetv2_train 4 2d 0 -tr nnUNetTrainerMACL",
    )
    add = parser.add_argument
    add(
        "dataset_name_or_id",
        help="data set, by name or id; its nnU-Net plan is used. Unlabelled images lie in its imagesUn",
    )
    add("-c", dest="configuration", help="nnU-Net configuration. Default: 3d_fullres where the plan has it, else 2d")
    add("-p", dest="plans", default="nnUNetPlans", help="plans identifier. Default: nnUNetPlans")
    add(
        "-u",
        dest="unlabelled",
        nargs="+",
        default=[],
        metavar="DATASET2",
        help="further raw data sets to take images from",
    )
    add("-recipe", help="a recipe that comes with the package, or a JSON file of your own. Default: macl")
    add("--exclude_fold", type=int, metavar="F", help="leave out the validation images of fold F")
    add("-num_epochs", type=int, help="recipe key")
    add("-num_iterations_per_epoch", type=int, help="recipe key")
    add("-batch_size", type=int, help="recipe key: patches a step, over all GPUs")
    add("-seed", type=int, help="recipe key")
    add(
        "-gpu_memory",
        type=float,
        metavar="GB",
        help="GPU memory that the batch is planned for. Default: what the nnU-Net plan was made for",
    )
    add("-np", dest="processes", type=int, default=8, help="processes for preprocessing. Default: 8")
    add("-device", default="cuda", help="cuda, cpu or mps. Default: cuda. Which GPU: CUDA_VISIBLE_DEVICES=X")
    add("-num_gpus", type=int, default=1, help="GPUs to train on. Default: 1")
    add("--c", dest="continue_training", action="store_true", help="go on with the run that was stopped")
    add("--disable_checkpointing", action="store_true", help="write no checkpoints and no weights")
    add("--skip_unreadable", action="store_true", help="leave out images that cannot be used, instead of stopping")
    add(
        "--channel_map",
        nargs="+",
        type=_pair,
        metavar="OURS=THEIRS",
        help="channel names of DATASET and those of the -u data sets, where they differ",
    )
    add("--plan_only", action="store_true", help="print and write the MACL plan, and stop")
    return parser


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"must be OURS=THEIRS, got '{text}'")
    return ours, theirs


def pretrain_entry() -> None:
    """``nnUNetv2_train_macl_pretrain``."""
    arguments = vars(_pretrain_parser().parse_args())
    for key in ("num_epochs", "num_iterations_per_epoch", "batch_size", "seed"):
        if arguments[key] is None:
            del arguments[key]

    def action() -> None:
        # nnU-Net takes seconds to import, and says so when folders are unset
        from nnunetv2_macl.run import pretrain

        if arguments["processes"] < 1:
            raise UserError(f"-np must be 1 or more, got {arguments['processes']}.")
        arguments["channel_map"] = dict(arguments["channel_map"] or {})
        pretrain(arguments.pop("dataset_name_or_id"), **arguments)

    _run(action)


def trainers_entry() -> None:
    """``nnUNetv2_macl_trainers``: the folder for nnUNet_extTrainer."""
    argparse.ArgumentParser(
        prog="nnUNetv2_macl_trainers",
        description="Print the folder of the MACL trainers, for nnU-Net to find.",
        epilog='Example: export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"',
    ).parse_args()
    print(resource_folder("trainers"))


def transfer_entry() -> None:
    """``nnUNetv2_macl_transfer``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_transfer",
        description="Show which pre-trained weights the fine-tuning of DATASET would take, and why not the others.",
        epilog="Example: nnUNetv2_macl_transfer macl_encoder.pth 27 -c 3d_fullres, then "
        "nnUNet_macl_weights=macl_encoder.pth nnUNetv2_train 27 3d_fullres 0 -tr nnUNetTrainerMACL",
    )
    parser.add_argument("weights", help="a pre-training run's folder, a file in it, or a checkpoint of nnssl")
    parser.add_argument("dataset_name_or_id", help="data set to fine-tune on, by name or id")
    parser.add_argument("-c", dest="configuration", help="nnU-Net configuration. Default: as in pre-training")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans identifier. Default: nnUNetPlans")
    arguments = parser.parse_args()

    def action() -> None:
        from nnunetv2_macl.training.finetune import show_transfer

        show_transfer(Path(arguments.weights), arguments.dataset_name_or_id, arguments.plans, arguments.configuration)

    _run(action)


def export_entry() -> None:
    """``nnUNetv2_macl_export``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_export",
        description="Write pre-trained weights in a format that others fine-tune from.",
        epilog="Example: nnUNetv2_macl_export macl_encoder.pth -o for_nnunet.pth --format nnunet",
    )
    parser.add_argument("weights", help="a pre-training run's folder, a file in it, or a checkpoint of nnssl")
    parser.add_argument("-o", dest="output", required=True, help="file to write")
    parser.add_argument(
        "--format",
        required=True,
        help="nnunet: for nnUNetv2_train -pretrained_weights; "
        "nnssl: for nnUNetv2_preprocess_like_nnssl and nnUNetv2_train_pretrained of nnU-Net's master branch",
    )
    arguments = parser.parse_args()

    def action() -> None:
        from nnunetv2_macl.formats import export

        export(Path(arguments.weights).expanduser(), Path(arguments.output).expanduser(), arguments.format)

    _run(action)


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
    add("-c", required=True, metavar="CONFIGURATION", help="nnU-Net configuration")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier; planned anew. Default: nnUNetPlans")
    add(
        "--arms",
        nargs="+",
        default=["scratch", "encoder", "macl"],
        metavar="ARM",
        help="scratch; encoder (its weights only); macl (encoder and decoder); recipe:NAME_OR_FILE (pre-trained with that "
        "recipe); weights:FILE (that are there already). Default: scratch encoder macl",
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
        "--rates",
        nargs="+",
        type=float,
        default=[1e-2, 1e-3],
        metavar="RATE",
        help="learning rates of fine-tuning; each arm gets its best on the validation cases. Default: 1e-2 1e-3",
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
    add("--dry_run", action="store_true", help="show split and cells, and stop")
    return parser


def compare_entry() -> None:
    """``nnUNetv2_macl_compare``."""
    arguments = vars(_compare_parser().parse_args())

    def action() -> None:
        from nnunetv2_macl.compare.run import compare
        from nnunetv2_macl.compare.study import Options

        how = {key: arguments.pop(key) for key in ("folder", "device", "processes", "jobs", "dry_run")}
        compare(Options(**arguments), **how)

    _run(action)


def demo_entry() -> None:
    """``nnUNetv2_macl_demo``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_demo",
        description="Generate a small data set and run it all on a CPU: planning, pre-training, fine-tuning, prediction.",
        epilog="Example: nnUNetv2_macl_demo /tmp/macl_demo",
    )
    parser.add_argument("folder", nargs="?", default="macl_demo", help="where to write. Default: ./macl_demo")
    folder = Path(parser.parse_args().folder)

    def action() -> None:
        from nnunetv2_macl.demo import demo

        demo(folder)

    _run(action)
