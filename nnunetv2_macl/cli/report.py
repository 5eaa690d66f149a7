"""The command ``nnUNetv2_macl_report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import run


def report_entry() -> None:
    """Run ``nnUNetv2_macl_report``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_report",
        description="Write the report of a pre-training run, a fine-tuned model or a study as one HTML file. The run or the "
        "study need not be finished.",
        epilog="Example: nnUNetv2_macl_report nnUNet_results/Dataset027_ACDC/nnUNetTrainerMACLPretrain__nnUNetPlans__2d/fold_all",
    )
    parser.add_argument("folder", help="folder of the run (fold_...) or of the study")
    parser.add_argument("-o", dest="output", help="file to write. Default: report.html in the folder")
    parser.add_argument(
        "-device", default="cpu", help="device that computes the features: cuda, cpu or mps. Default: cpu"
    )
    arguments = parser.parse_args()

    def action() -> None:
        from nnunetv2_macl.report import write_report
        from nnunetv2_macl.run import check_device

        check_device(arguments.device)
        output = Path(arguments.output).expanduser() if arguments.output else None
        print(write_report(Path(arguments.folder).expanduser(), output, arguments.device))

    run(action)
