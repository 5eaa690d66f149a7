"""Render the report of a run, a training or a study, and write it to a file."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import jinja2

from nnunetv2_macl import __version__, checkpoints
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write
from nnunetv2_macl.report import finetuned, pretraining, study

FILE = "report.html"
MOST_BYTES = 5 * 2**20
# for pages that do not name their own citations
_CITATIONS = {
    "citations": [checkpoints.NNUNET_CITATION, "The sources of the pre-training, which the report of its run names."]
}


def write_report(folder: Path, file: Path | None = None, device: str = "cpu") -> Path:
    """Write the report of a pre-training run, of a fine-tuned model or of a study, finished or not, and return its file.

    Args:
        folder: Folder of the run (``.../fold_all``), of the model (``.../fold_0``), or of the study.
        file: File to write. None: ``report.html`` in the folder.
        device: Device that computes the features.

    Raises:
        UserError: The folder holds none of these, or the file cannot be written.
    """
    file = file or folder / FILE
    page = _render(folder, device)
    atomic_write(file, lambda stream: stream.write(page))
    return file


def write_report_after_run(folder: Path, log: Callable[[str], None], device: str = "cpu") -> None:
    """Write the report at the end of a run. Errors are only logged, because they must not end the run."""
    try:
        log(f"Report: {write_report(folder, device=device)}")
    except Exception as error:
        log(f"No report was written: {error}. To try again: nnUNetv2_macl_report {shlex.quote(str(folder))}")


def _render(folder: Path, device: str) -> bytes:
    if study.is_study(folder):
        template, values = study.TEMPLATE, study.describe_study(folder)
    elif finetuned.is_training(folder):
        template, values = finetuned.TEMPLATE, finetuned.describe_training(folder)
    else:
        template, values = pretraining.TEMPLATE, pretraining.describe_run(folder, device)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nnunetv2_macl.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**_CITATIONS | values, version=__version__)
    content = text.encode()
    if len(content) > MOST_BYTES:
        raise UserError(f"The report would take {len(content):,} bytes, more than the limit of {MOST_BYTES:,}.")
    return content
