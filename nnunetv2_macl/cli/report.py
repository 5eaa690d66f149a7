"""``nnUNetv2_macl_report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_macl.cli.messages import run


def report_entry() -> None:
    """``nnUNetv2_macl_report``."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_macl_report",
        description="Write the report of a pre-training run, a fine-tuned model or a study, finished or not: one HTML file.",
        epilog="Example: nnUNetv2_macl_report nnUNet_results/Dataset027_ACDC/nnUNetTrainerMACLPretrain__nnUNetPlans__2d/fold_all",
    )
    parser.add_argument("folder", help="of the run (fold_...), or of the study")
    parser.add_argument("-o", dest="output", help="file to write. Default: report.html in the folder")
    parser.add_argument("-device", default="cpu", help="to compute features on. Default: cpu")
    arguments = parser.parse_args()

    def action() -> None:
        from nnunetv2_macl.report import write_report

        output = Path(arguments.output).expanduser() if arguments.output else None
        print(write_report(Path(arguments.folder).expanduser(), output, arguments.device))

    run(action)
