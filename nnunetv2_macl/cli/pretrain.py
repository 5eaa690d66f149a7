"""The commands ``nnUNetv2_train_macl_pretrain``, ``nnUNetv2_macl_network`` and ``nnUNetv2_macl_demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import call, run
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.networks import NAMES


def _pretrain_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_train_macl_pretrain",
        description="Pre-train the network that nnU-Net planned for DATASET on unlabelled images: its encoder and part of its "
        "decoder. Then fine-tune it with nnU-Net's own command.",
        epilog="Example: nnUNetv2_train_macl_pretrain 4 -c 2d, then nnUNetv2_train 4 2d 0 -tr nnUNetTrainerMACL",
    )
    add = parser.add_argument
    add(
        "dataset_name_or_id",
        help="data set, by name or id. Its nnU-Net plan is used, and its folder imagesUn holds the unlabelled images",
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
        help="further raw data sets whose images are used",
    )
    add("-recipe", help="name of a recipe of this package, or your own JSON file. Default: macl")
    add(
        "--set",
        dest="settings",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="values that replace those of the recipe: --set temperature=0.2 optimizer=adamw",
    )
    add("--exclude_fold", type=int, metavar="F", help="do not train on the validation images of fold F")
    add("-num_epochs", type=int, help="number of epochs. Default: the recipe's")
    add("-num_iterations_per_epoch", type=int, help="training steps per epoch. Default: the recipe's")
    add("-batch_size", type=int, help="patches per step, over all GPUs. Default: the recipe's")
    add(
        "-patches_at_once",
        type=int,
        help="patches of a batch that are computed at once. Fewer patches need less memory, and contrastive recipes then "
        "take a third more time. Default: the recipe's",
    )
    add("-seed", type=int, help="random seed. Default: the recipe's")
    add(
        "-gpu_memory",
        type=float,
        metavar="GB",
        help="GPU memory for which the batch size is planned. Default: the target of nnU-Net's planner",
    )
    add("-np", dest="processes", type=int, default=8, help="processes for preprocessing. Default: 8")
    add("-device", default="cuda", help="cuda, cpu or mps. CUDA_VISIBLE_DEVICES=X selects a GPU. Default: cuda")
    add("-num_gpus", type=int, default=1, help="number of GPUs to train on. Default: 1")
    add(
        "-pretrained_weights",
        metavar="FILE_OR_FOLDER",
        help="weights to start from: the folder of a pre-training run, a file in it, a checkpoint of nnU-Net or nnssl, or a "
        "file that the MACL authors published. Default: a freshly initialised network",
    )
    add("--c", "--resume", dest="continue_training", action="store_true", help="continue a run that was stopped")
    add("--disable_checkpointing", action="store_true", help="write no checkpoints and no weights")
    add("--skip_unreadable", action="store_true", help="leave out images that cannot be used, instead of stopping")
    add(
        "--channel_map",
        action="extend",
        nargs="+",
        type=_pair,
        metavar="OURS=THEIRS",
        help="name of a channel in DATASET and its name in the -u data sets, where they differ",
    )
    add("--plan_only", action="store_true", help="write and print the MACL plan, and stop")
    add("--preprocess_only", action="store_true", help="preprocess the unlabelled images, and stop")
    add("-num_parts", type=int, default=1, help="number of machines that share the preprocessing. Default: 1")
    add("-part_id", type=int, default=0, help="number of this machine, counted from 0. Default: 0")
    return parser


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"must be OURS=THEIRS, got '{text}'")
    return ours, theirs


def pretrain_entry() -> None:
    """Run ``nnUNetv2_train_macl_pretrain``."""
    arguments = vars(_pretrain_parser().parse_args())
    settings = arguments.pop("settings")
    for key in ("num_epochs", "num_iterations_per_epoch", "batch_size", "patches_at_once", "seed"):
        if (value := arguments.pop(key)) is not None:
            settings.append(f"{key}={value}")

    def action() -> None:
        # nnU-Net takes seconds to import, and prints warnings if its folders are not set.
        from nnunetv2_macl.recipe import parse_settings
        from nnunetv2_macl.run import pretrain
        from nnunetv2_macl.training.signals import ignore_save_requests

        ignore_save_requests()
        if arguments["processes"] < 1:
            raise UserError(f"-np must be 1 or more, got {arguments['processes']}.")
        pairs = arguments["channel_map"] or []
        arguments["channel_map"] = dict(pairs)
        if twice := [f"{ours}={theirs}" for ours, theirs in pairs if arguments["channel_map"][ours] != theirs]:
            raise UserError(
                f"--channel_map names a channel twice: {twice[0]} and another pair. Give one name for each channel."
            )
        pretrain(arguments.pop("dataset_name_or_id"), **arguments, **parse_settings(settings, "Command line"))

    run(action)


def network_entry() -> None:
    """Run ``nnUNetv2_macl_network``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_network",
        description="Copy the nnU-Net plan of DATASET and replace the network: by a variant of the U-Net, a network of "
        "another library, the network of the MACL paper, or your own.",
        epilog="Example: nnUNetv2_macl_network 27 attention_unet -c 3d_fullres, then nnUNetv2_train_macl_pretrain 27 "
        "-c 3d_fullres -p nnUNetPlans_attention_unet",
    )
    parser.add_argument("dataset_name_or_id", help="data set, by name or id, planned by nnU-Net")
    parser.add_argument(
        "network",
        help=f"{', '.join(NAMES)}, or a JSON file with the keys architecture and batch_size of nnU-Net's plans",
    )
    parser.add_argument("-c", dest="configuration", default="2d", help="configuration to change. Default: 2d")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plan to copy. Default: nnUNetPlans")
    parser.add_argument("-o", dest="plans_name", help="name of the new plan. Default: PLANS_NETWORK")
    parser.add_argument(
        "-size",
        help="size of the network: S, M or L for rolling_unet and ukan; T, S or B for swin_unetr; S, B, M or L for primus",
    )
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
            print("Every machine that trains or predicts with this network needs nnunetv2_macl.")

    run(action)


def demo_entry() -> None:
    """Run ``nnUNetv2_macl_demo``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_demo",
        description="Generate a small data set and run every step on a CPU: planning, pre-training, fine-tuning, prediction.",
        epilog="Example: nnUNetv2_macl_demo /tmp/macl_demo",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default="macl_demo", help="new folder to write to. Default: ./macl_demo"
    )
    call(parser, "demo:demo")
