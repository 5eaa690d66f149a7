"""Draw the pictures of docs/pictures: what the commands print and write, on generated data.

    python docs/draw_outputs.py FOLDER

The commands run in FOLDER, and their results stay there. A command whose results are there is not run again. The report is
drawn if a Chromium browser is installed (`chromium-headless-shell` on Debian).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from nnunetv2_macl.demo import DATASET
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import FOLDER_VARIABLES
from nnunetv2_macl.synthetic import generate_dataset

PICTURES = Path(__file__).parent / "pictures"
PRETRAIN = (
    "nnUNetv2_train_macl_pretrain 900 -c 2d -device cpu -np 2 -batch_size 8 -num_epochs 12 -num_iterations_per_epoch 25"
)
COMPARE = (
    "nnUNetv2_macl_compare 900 -c 2d --arms scratch pretrained --labels 2 --seeds 1 --finetuning sgd --rates 1e-2 --test 2 "
    "--validation 1 --epochs 3 --iterations 8 -batch_size 4 --pretrain_epochs 1 --pretrain_iterations 5 --pretrain_batch_size 4 "
    "--disable_tta -device cpu -np 1 -o study"
)
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the commands, and draw their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(arguments).folder.resolve()
    raw = folder / "nnUNet_raw" / DATASET
    if not raw.is_dir():
        generate_dataset(raw)
    for variable in FOLDER_VARIABLES:
        (folder / variable).mkdir(exist_ok=True)
    preprocessed, results = folder / "nnUNet_preprocessed" / DATASET, folder / "nnUNet_results" / DATASET
    fold = results / "nnUNetTrainerMACLPretrain__nnUNetPlans__2d" / "fold_all"
    run(folder, "nnUNetv2_plan_and_preprocess -d 900 -c 2d -npfp 2 -np 2", preprocessed / "nnUNetPlans_2d")
    doctor = run(folder, "nnUNetv2_macl_doctor 900 -c 2d -device cpu", folder / "doctor.txt")
    # In a shell without the variable, the doctor ends with code 1.
    wrong = run(folder, "nnUNetv2_macl_doctor -device cpu", folder / "doctor_wrong.txt", code=1, nnUNet_extTrainer="")
    run(folder, PRETRAIN, fold / "report.html")
    run(folder, COMPARE, folder / "study" / "compare.md")

    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "doctor.svg").write_text(terminal(doctor, folder))
    (PICTURES / "doctor_wrong.svg").write_text(terminal(wrong, folder))
    verdict = (folder / "study" / "compare.md").read_text(encoding="utf-8")
    (PICTURES / "verdict.svg").write_text(terminal(f"$ head compare.md\n{upper_part(verdict)}", folder))
    shrink(fold / "progress.png", "progress.png")
    shrink(fold / "views.png", "views.png", width=700, upper=0.53)
    shrink(folder / "study" / "compare.png", "compare.png")
    photograph((fold / "report.html").read_text(encoding="utf-8").replace(str(folder), "~"), "report.png")


def run(folder: Path, command: str, result: Path, code: int = 0, **variables: str) -> str:
    """Run a command in FOLDER unless its result is there, and return the command and what it printed.

    Args:
        folder: Folder of the script's own argument.
        command: Command as a user types it.
        result: File or folder that the command writes. What the command prints is in a text file of this name.
        code: Code with which the command ends.
        variables: Environment variables that differ.
    """
    printed = folder / f"{result.stem}.txt"
    if not result.exists():
        print(command, flush=True)
        environment = os.environ | {name: str(folder / name) for name in FOLDER_VARIABLES}
        environment["nnUNet_extTrainer"] = str(resource_folder("trainers"))
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        environment |= variables
        process = subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True)
        if process.returncode != code:
            raise SystemExit(f"{command}\n{process.stdout[-3000:]}{process.stderr[-3000:]}")
        printed.write_text(f"$ {command}\n{process.stdout}")
    return printed.read_text(encoding="utf-8")


def upper_part(page: str, tables: int = 2) -> str:
    """Return a page of Markdown up to the end of a table."""
    blocks = page.split("\n\n")
    ends = [number for number, block in enumerate(blocks) if block.lstrip().startswith("|")]
    return "\n\n".join(blocks[: ends[:tables][-1] + 1])


def terminal(text: str, folder: Path, width: int = 100) -> str:
    """Return an SVG that shows lines of text as a terminal does. It is dark, so that every page can show it."""
    text = text.replace(str(folder), "~").replace(sys.prefix, "~/.venv")
    lines = [
        part
        for line in text.rstrip().splitlines()
        for part in textwrap.wrap(line, width, subsequent_indent=8 * " ", break_on_hyphens=False) or [""]
    ]
    height = 17 * len(lines) + 24
    rows = [
        f'<text x="14" y="{27 + 17 * number}" fill="{colour(line)}" xml:space="preserve">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    across = round(7.85 * width + 28)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {height}" width="{across}" height="{height}"',
            '  font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="13">',
            f'<rect width="{across}" height="{height}" rx="8" fill="#1c2128"/>',
            *rows,
            "</svg>\n",
        ]
    )


def colour(line: str) -> str:
    """Return the colour of a line by its first word."""
    first = re.match(r"\s*(\S*)", line).group(1)
    return {"$": "#8ab4f8", "ok": "#8ddb8c", "WRONG": "#ff7b72", "--": "#f0c36d"}.get(first, "#e4e7eb")


def shrink(source: Path, name: str, width: int = 900, upper: float = 1.0) -> None:
    """Write the upper part of a picture, at most so many pixels across and with 128 colours, so that the file is small."""
    image = Image.open(source).convert("RGB")
    image = image.crop((0, 0, image.width, round(upper * image.height)))
    image.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
    image.quantize(128, dither=Image.Dither.NONE).save(PICTURES / name, optimize=True)


def photograph(page: str, name: str) -> None:
    """Write a picture of the top of an HTML page, as a browser shows it."""
    browser = next((found for known in BROWSERS if (found := shutil.which(known))), None)
    if browser is None:
        print(f"{name} is not drawn, because no browser was found. Known are: {', '.join(BROWSERS)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        file, html = Path(folder) / name, Path(folder) / "page.html"
        html.write_text(page, encoding="utf-8")
        # A browser that the root of a container starts has no sandbox.
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,1350", f"--screenshot={file}"]
        subprocess.run([browser, *options, html.as_uri()], check=True, capture_output=True)
        shrink(file, name)


if __name__ == "__main__":
    main()
