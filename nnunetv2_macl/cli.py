"""Command lines: arguments in, messages out; what is done lies elsewhere."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from nnunetv2_macl import doctor
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
    add("-patches_at_once", type=int, help="recipe key: fewer than the batch take less memory and a third more time")
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
    add("--preprocess_only", action="store_true", help="preprocess the unlabelled images, and stop")
    add("-num_parts", type=int, default=1, help="machines that share the preprocessing. Default: 1")
    add("-part_id", type=int, default=0, help="which of them this is, from 0")
    return parser


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"must be OURS=THEIRS, got '{text}'")
    return ours, theirs


def pretrain_entry() -> None:
    """``nnUNetv2_train_macl_pretrain``."""
    arguments = vars(_pretrain_parser().parse_args())
    for key in ("num_epochs", "num_iterations_per_epoch", "batch_size", "patches_at_once", "seed"):
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
        description="Write pre-trained weights for others, or in a format that others fine-tune from.",
        epilog="Examples: nnUNetv2_macl_export RUN_FOLDER -o weights.zip; "
        "nnUNetv2_macl_export macl_encoder.pth -o for_nnunet.pth --format nnunet",
    )
    parser.add_argument("weights", help="a pre-training run's folder, a file in it, or a checkpoint of nnssl")
    parser.add_argument("-o", dest="output", required=True, help="file to write")
    parser.add_argument(
        "--format",
        help="zip: one file for others, for nnUNetv2_macl_install (default where the file ends in .zip); "
        "nnunet: for nnUNetv2_train -pretrained_weights; "
        "nnssl: for nnUNetv2_preprocess_like_nnssl and nnUNetv2_train_pretrained of nnU-Net's master branch",
    )
    parser.add_argument("--license", default="unknown", help="for the model card in a zip, as hubs write it: cc-by-4.0")
    arguments = parser.parse_args()

    def action() -> None:
        from nnunetv2_macl.formats import export

        export(
            Path(arguments.weights).expanduser(),
            Path(arguments.output).expanduser(),
            arguments.format,
            arguments.license,
        )

    _run(action)


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

    _run(action)


def inspect_entry() -> None:
    """``nnUNetv2_macl_inspect``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_inspect",
        description="Say what a file is, what it was trained on and how, and whether it is whole.",
        epilog="Example: nnUNetv2_macl_inspect macl_encoder.pth",
    )
    parser.add_argument("file", help="checkpoint, exported weights, MACL plan, package (.zip), or checkpoint of nnssl")
    file = Path(parser.parse_args().file).expanduser()

    def action() -> None:
        from nnunetv2_macl.sharing.inspect import inspect

        print(inspect(file))

    _run(action)


def report_entry() -> None:
    """``nnUNetv2_macl_report``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_report",
        description="Write the report of a pre-training run, finished or not: one HTML file.",
        epilog="Example: nnUNetv2_macl_report nnUNet_results/Dataset027_ACDC/nnUNetTrainerMACLPretrain__nnUNetPlans__2d/fold_all",
    )
    parser.add_argument("folder", help="of the run")
    parser.add_argument("-o", dest="output", help="file to write. Default: report.html in the folder")
    parser.add_argument("-device", default="cpu", help="to compute features on. Default: cpu")
    arguments = parser.parse_args()

    def action() -> None:
        from nnunetv2_macl.report import write_report

        output = Path(arguments.output).expanduser() if arguments.output else None
        print(write_report(Path(arguments.folder).expanduser(), output, arguments.device))

    _run(action)


def doctor_entry() -> None:
    """``nnUNetv2_macl_doctor``: exit code 0 only when all is right."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_doctor",
        description="Say what is right on this machine and what is not, and the command that mends it.",
        epilog="Example: nnUNetv2_macl_doctor 27 -c 2d",
    )
    parser.add_argument("dataset_name_or_id", nargs="?", help="data set to look at as well, by name or id")
    parser.add_argument("-c", dest="configuration", help="nnU-Net configuration. Default: as in pre-training")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans identifier. Default: nnUNetPlans")
    parser.add_argument("-device", default="cuda", help="cuda, cpu or mps. Default: cuda")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    results = []
    for result in doctor.examine(
        arguments.dataset_name_or_id, arguments.configuration, arguments.plans, arguments.device
    ):
        results.append(result)
        if not arguments.json:
            print(doctor.as_lines(result), flush=True)
    wrong = sum(result.status == doctor.WRONG for result in results)
    if arguments.json:
        print(json.dumps(doctor.as_json(results), indent=2))
    else:
        print(f"\n{wrong} to mend: the lines after '>'." if wrong else "\nAll is right.")
    sys.exit(1 if wrong else 0)


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
