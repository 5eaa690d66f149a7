"""The demonstration runs every command that a user types on a generated data set, on a CPU."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import FOLDER_VARIABLES, WEIGHTS_VARIABLE, read_json
from nnunetv2_macl.synthetic import generate_dataset

DATASET = "Dataset900_MACLDemo"


def demo(folder: Path) -> dict[str, float]:
    """Generate data, plan, preprocess, pre-train, fine-tune, predict and evaluate in a new folder.

    Returns:
        ``dice``, the mean foreground Dice, and ``seconds``, the time of all steps.

    Raises:
        UserError: The folder holds something else, or a command failed.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Give a folder: nnUNetv2_macl_demo FOLDER")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and the demonstration overwrites nothing. Give a new folder.")
    began = perf_counter()
    environment = dict(os.environ)
    environment.pop(WEIGHTS_VARIABLE, None)
    for variable in FOLDER_VARIABLES:
        environment[variable] = str(folder / variable)
        (folder / variable).mkdir(parents=True)
    environment |= {"nnUNet_extTrainer": str(resource_folder("trainers")), "nnUNet_n_proc_DA": "1"}
    # Find the commands of this environment first, also if it is not activated.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    raw = folder / "nnUNet_raw" / DATASET
    results = folder / "nnUNet_results" / DATASET
    predictions = folder / "predictions"

    print(
        f"1. A data set is generated in {raw}: 6 labelled cases, 24 unlabelled in imagesUn, 4 to test on.", flush=True
    )
    generate_dataset(raw)
    print("\nSix steps follow. They take five to eight minutes on two cores. In your own shell you would first type:\n")
    for variable in FOLDER_VARIABLES:
        print(f'    export {variable}="{environment[variable]}"')
    print('    export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"')

    def run(title: str, command: str) -> None:
        print(f"\n{title}\n\n    {command}\n", flush=True)
        # nnU-Net prints many lines, so show only some and write all to a log.
        log = folder / f"{command.split()[0]}.log"
        with log.open("w") as stream:
            process = subprocess.run(shlex.split(command), env=environment, stdout=stream, stderr=subprocess.STDOUT)
        lines = log.read_text(errors="replace").splitlines()
        if process.returncode:
            tail = "\n".join(lines[-15:])
            raise UserError(f"'{command}' failed with code {process.returncode}; {log} ends with\n{tail}")
        for line in lines:
            if any(word in line for word in _SHOWN) and "data_identifier" not in line:
                print(f"    | {line}", flush=True)

    quoted = shlex.quote
    run("2. nnU-Net plans and preprocesses.", "nnUNetv2_plan_and_preprocess -d 900 -c 2d -npfp 2 -np 2")
    run(
        "3. This package pre-trains encoder and decoder on all images, without labels, in a short run of the default recipe.",
        "nnUNetv2_train_macl_pretrain 900 -c 2d -device cpu -np 2 -batch_size 16 -num_epochs 5 -num_iterations_per_epoch 20",
    )
    run(
        "4. nnU-Net fine-tunes from the pre-trained weights.",
        "nnUNetv2_train 900 2d 0 -tr nnUNetTrainerMACL_1epoch -device cpu",
    )
    run(
        "5. nnU-Net predicts. Prediction does not need this package, here or on another machine.",
        f"nnUNetv2_predict -d 900 -c 2d -f 0 -tr nnUNetTrainerMACL_1epoch -device cpu --disable_tta "
        f"-i {quoted(str(raw / 'imagesTs'))} -o {quoted(str(predictions))}",
    )
    run(
        "6. nnU-Net evaluates.",
        f"nnUNetv2_evaluate_folder {quoted(str(raw / 'labelsTs'))} {quoted(str(predictions))} "
        f"-djfile {quoted(str(raw / 'dataset.json'))} -pfile {quoted(str(predictions / 'plans.json'))}",
    )
    summary = read_json(predictions / "summary.json", "")
    dice = float(summary["foreground_mean"]["Dice"])
    seconds = perf_counter() - began
    pretraining = results / "nnUNetTrainerMACLPretrain__nnUNetPlans__2d" / "fold_all"
    finetuning = results / "nnUNetTrainerMACL_1epoch__nnUNetPlans__2d" / "fold_0"
    print(f"\nMean Dice of the predictions on 4 unseen cases: {dice:.3f} (done in {seconds / 60:.1f} minutes)")
    print("Pictures, and the report of the pre-training:")
    pictures = [pretraining / "views.png", pretraining / "progress.png", finetuning / "progress.png"]
    for file in (*pictures, pretraining / "report.html"):
        print(f"    {file}")
    return {"dice": dice, "seconds": seconds}


_SHOWN = (
    "MACL plan of", "decoder_stages", "batch_size", "threshold", "Pre-training on", "loss ", "COLLAPSED", "Weights:",
    "tensors loaded", "MACL weights", "train_loss", "val_loss", "Pseudo dice", "Validation complete", "Mean Validation Dice",
)  # fmt: skip
