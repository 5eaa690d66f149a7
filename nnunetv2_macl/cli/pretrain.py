"""``nnUNetv2_train_macl_pretrain``, ``nnUNetv2_macl_network`` and ``nnUNetv2_macl_demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import run
from nnunetv2_macl.errors import UserError


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
    add(
        "-c",
        dest="configuration",
        help="nnU-Net configuration. Default: the first of 3d_fullres, 3d_lowres, 2d in the plan",
    )
    add("-p", dest="plans", default="nnUNetPlans", help="plans identifier. Default: nnUNetPlans")
    add(
        "-u",
        dest="unlabelled",
        action="extend",
        nargs="+",
        default=[],
        metavar="DATASET2",
        help="further raw data sets to take images from",
    )
    add("-recipe", help="a recipe that comes with the package, or a JSON file of your own. Default: restore")
    add(
        "--set",
        dest="settings",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="values of recipe keys, which replace those of the recipe: --set temperature=0.2 optimizer=adamw",
    )
    add("--exclude_fold", type=int, metavar="F", help="leave out the validation images of fold F")
    add("-num_epochs", type=int, help="recipe key")
    add("-num_iterations_per_epoch", type=int, help="recipe key")
    add("-batch_size", type=int, help="recipe key: patches a step, over all GPUs")
    add(
        "-patches_at_once",
        type=int,
        help="recipe key: fewer than the batch take less memory, and with contrast a third more time",
    )
    add("-seed", type=int, help="recipe key")
    add(
        "-gpu_memory",
        type=float,
        metavar="GB",
        help="GPU memory that the batch is planned for. Default: what nnU-Net's planner aims at by itself",
    )
    add("-np", dest="processes", type=int, default=8, help="processes for preprocessing. Default: 8")
    add("-device", default="cuda", help="cuda, cpu or mps. Default: cuda. Which GPU: CUDA_VISIBLE_DEVICES=X")
    add("-num_gpus", type=int, default=1, help="GPUs to train on. Default: 1")
    add(
        "-pretrained_weights",
        metavar="FILE_OR_FOLDER",
        help="weights to start from, instead of a freshly initialised network: a pre-training run's folder, a file in it, a "
        "checkpoint of nnU-Net or nnssl, or a file of the MACL authors",
    )
    add("--c", "--resume", dest="continue_training", action="store_true", help="continue the run that was stopped")
    add("--disable_checkpointing", action="store_true", help="write no checkpoints and no weights")
    add("--skip_unreadable", action="store_true", help="leave out images that cannot be used, instead of stopping")
    add(
        "--channel_map",
        action="extend",
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
    settings = arguments.pop("settings")
    for key in ("num_epochs", "num_iterations_per_epoch", "batch_size", "patches_at_once", "seed"):
        if (value := arguments.pop(key)) is not None:
            settings.append(f"{key}={value}")

    def action() -> None:
        # nnU-Net takes seconds to import, and says so when folders are unset
        from nnunetv2_macl.recipe import parse_settings
        from nnunetv2_macl.run import pretrain

        if arguments["processes"] < 1:
            raise UserError(f"-np must be 1 or more, got {arguments['processes']}.")
        arguments["channel_map"] = dict(arguments["channel_map"] or {})
        pretrain(arguments.pop("dataset_name_or_id"), **arguments, **parse_settings(settings, "Command line"))

    run(action)


def network_entry() -> None:
    """``nnUNetv2_macl_network``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_network",
        description="Write a nnU-Net plan of DATASET that is its own but for the network: a variant of the U-Net, a network "
        "of another library, the paper's network, or one of your own.",
        epilog="Example: nnUNetv2_macl_network 27 attention_unet -c 3d_fullres, then nnUNetv2_train_macl_pretrain 27 "
        "-c 3d_fullres -p nnUNetPlans_attention_unet",
    )
    parser.add_argument("dataset_name_or_id", help="data set, by name or id, planned by nnU-Net")
    parser.add_argument(
        "network",
        help="attention_unet, uctransnet, rolling_unet, ukan, primus, primus_v2, primus_v3, swin_unetr, unetr, paper, or a "
        "JSON file with architecture and batch_size as nnU-Net's plans have them",
    )
    parser.add_argument("-c", dest="configuration", default="2d", help="configuration of the plan. Default: 2d")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plan to start from. Default: nnUNetPlans")
    parser.add_argument("-o", dest="plans_name", help="name of the new plan. Default: PLANS_NETWORK")
    parser.add_argument("-size", help="S, M or L, where the network has these sizes")
    arguments = parser.parse_args()

    def action() -> None:
        from nnunetv2_macl.planning.network import explain_changes, needs_this_package, plan_network

        dataset, plans, configuration = arguments.dataset_name_or_id, arguments.plans, arguments.configuration
        file = plan_network(
            dataset, arguments.network, plans, configuration, size=arguments.size, name=arguments.plans_name
        )
        print(f"{file}\nChanges to {plans} in {configuration}:")
        print("\n".join(f"  {line}" for line in explain_changes(dataset, plans, file.stem, configuration)))
        print(f"Use it with: -p {file.stem}")
        if needs_this_package(file):
            print("Training and prediction with this network need nnunetv2_macl, wherever they run.")

    run(action)


def demo_entry() -> None:
    """``nnUNetv2_macl_demo``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_demo",
        description="Generate a small data set and run it all on a CPU: planning, pre-training, fine-tuning, prediction.",
        epilog="Example: nnUNetv2_macl_demo /tmp/macl_demo",
    )
    parser.add_argument("folder", nargs="?", default="macl_demo", help="where to write. Default: ./macl_demo")
    folder = Path(parser.parse_args().folder)

    from nnunetv2_macl.demo import demo

    run(lambda: demo(folder))
