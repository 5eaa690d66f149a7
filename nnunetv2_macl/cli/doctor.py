"""The commands ``nnUNetv2_macl_doctor`` and ``nnUNetv2_macl_trainers``."""

from __future__ import annotations

import argparse
import json
import sys

from nnunetv2_macl import doctor
from nnunetv2_macl.cli.messages import exit_where_output_is_full
from nnunetv2_macl.files import trainer_folders
from nnunetv2_macl.messages import show_any_character
from nnunetv2_macl.text import pluralise


def doctor_entry() -> None:
    """Run ``nnUNetv2_macl_doctor``. The exit code is 1 if there is a problem, and 0 otherwise."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_doctor",
        description="Check this machine, and a data set if you name one. Show the command that fixes each problem.",
        epilog="Example: nnUNetv2_macl_doctor 27 -c 2d",
    )
    parser.add_argument("dataset_name_or_id", nargs="?", help="data set to check as well, by name or id")
    parser.add_argument(
        "-c",
        dest="configuration",
        help="nnU-Net configuration. Default: the first of 3d_fullres, 3d_lowres, 2d in the plan",
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans identifier. Default: nnUNetPlans")
    parser.add_argument("-device", default="cuda", help="cuda, cpu or mps. Default: cuda")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    arguments = parser.parse_args()
    show_any_character()
    with exit_where_output_is_full():
        _run_checks(arguments)


def _run_checks(arguments: argparse.Namespace) -> None:
    results = []
    for result in doctor.run_checks(
        arguments.dataset_name_or_id, arguments.configuration, arguments.plans, arguments.device
    ):
        results.append(result)
        if not arguments.json:
            print(doctor.as_lines(result), flush=True)
    wrong = sum(result.status == doctor.PROBLEM for result in results)
    if arguments.json:
        print(json.dumps(doctor.as_json(results), indent=2))
    else:
        problems = f"{pluralise(wrong, 'problem')} found. The lines after '>' show how to fix them."
        print(f"\n{problems if wrong else 'No problem found.'}")
    sys.exit(1 if wrong else 0)


def trainers_entry() -> None:
    """Run ``nnUNetv2_macl_trainers``."""
    argparse.ArgumentParser(
        prog="nnUNetv2_macl_trainers",
        description="Print the folder of the MACL trainers, followed by the other folders in your nnUNet_extTrainer. nnU-Net "
        "searches for trainers in all folders of this variable.",
        epilog='Example: export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"',
    ).parse_args()
    with exit_where_output_is_full():
        print(trainer_folders())
