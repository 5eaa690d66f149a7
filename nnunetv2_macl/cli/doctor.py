"""``nnUNetv2_macl_doctor`` and ``nnUNetv2_macl_trainers``."""

from __future__ import annotations

import argparse
import json
import sys

from nnunetv2_macl import doctor
from nnunetv2_macl.cli.messages import exit_where_output_is_full
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.messages import show_any_character


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
        print(f"\n{wrong} to mend: the lines after '>'." if wrong else "\nAll is right.")
    sys.exit(1 if wrong else 0)


def trainers_entry() -> None:
    """``nnUNetv2_macl_trainers``: the folder for nnUNet_extTrainer."""
    argparse.ArgumentParser(
        prog="nnUNetv2_macl_trainers",
        description="Print the folder of the MACL trainers, for nnU-Net to find.",
        epilog='Example: export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"',
    ).parse_args()
    with exit_where_output_is_full():
        print(resource_folder("trainers"))
