"""Train one cell of a study, predict the test cases, and measure the predictions, in a separate process.

Usage: ``python -m nnunetv2_macl.compare.cell STUDY CELL``. nnU-Net's folder variables must be set.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_macl.compare.measure import measure
from nnunetv2_macl.compare.stopping import ended_by_sigterm
from nnunetv2_macl.compare.study import RESULT_FILE, Study, Trial
from nnunetv2_macl.compare.trainer import CURVE_FILE, trainer_class
from nnunetv2_macl.cpu import usable_cores
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import write_json
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json
from nnunetv2_macl.semi_supervised.settings import parse_semi_settings
from nnunetv2_macl.semi_supervised.trainer import nnUNetTrainerMACLSemi
from nnunetv2_macl.training.run_folder import RunLock


def run_cell(study: Study, cell: Trial, device: str, processes: int) -> None:
    """Train a cell, or continue its training, and write ``result.json``. The study must be planned and pre-trained."""
    folder, options = study.cell_folder(cell), study.options
    target = DatasetConfiguration.load(options.dataset, options.plans, options.configuration)
    plans = target.plans_manager.plans | {"continue_training": False}
    study.write_splits()
    fold = study.fold(cell)
    arm = study.arm(cell.arm)
    trainer = trainer_class(arm, options.finetuning)(
        plans, options.configuration, fold, target.dataset_json, torch.device(device)
    )
    if isinstance(trainer, nnUNetTrainerMACLSemi):
        trainer.semi = parse_semi_settings(arm.semi or (), f"Arm {arm.name}")
    torch.backends.cudnn.benchmark = device == "cuda"  # as nnU-Net's training command
    lock = RunLock(Path(trainer.output_folder))
    lock.acquire()
    try:
        trainer.configure_trial(
            epochs=options.epochs,
            iterations=options.iterations,
            rate=cell.rate,
            seed=cell.seed,
            from_scratch=study.weights(arm) is None,
            optimizer="adamw" if options.finetuning == "adamw" else "sgd",
        )
        final, latest = (Path(trainer.output_folder) / f"checkpoint_{which}.pth" for which in ("final", "latest"))
        if not final.is_file():
            if latest.is_file():
                trainer.load_checkpoint(str(latest))
            trainer.run_training()
        predictions = folder / "predictions"
        # not weights_only, because nnU-Net stores more than tensors; the file is safe, because this study wrote it
        log = torch.load(final, map_location="cpu", weights_only=False)["logging"]
        seconds = np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"])
        _predict(study, Path(trainer.output_folder_base), fold, predictions, device, processes)
        write_json(
            {
                "test": _measure(study, target, predictions),
                "curve": read_json(Path(trainer.output_folder) / CURVE_FILE, f"Remove {folder} to train again."),
                "epoch_seconds": float(seconds.mean()),
            },
            folder / RESULT_FILE,
        )
    finally:
        # other machines would wait for a cell that stays locked
        lock.release()


def _predict(study: Study, model: Path, fold: int, predictions: Path, device: str, processes: int) -> None:
    predictor = nnUNetPredictor(
        use_mirroring=not study.options.disable_tta, device=torch.device(device), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(model), (fold,), "checkpoint_final.pth")
    predictions.mkdir(exist_ok=True)
    files = str(study.raw / "imagesTs"), str(predictions)
    # more processes than cores or cases only import torch
    processes = min(processes, usable_cores(), len(study.split.test))
    if processes == 1:
        predictor.predict_from_files_sequential(*files)
    else:
        predictor.predict_from_files(
            *files, num_processes_preprocessing=processes, num_processes_segmentation_export=processes
        )


def _measure(study: Study, target: DatasetConfiguration, predictions: Path) -> list[dict[str, Any]]:
    labels = target.plans_manager.get_label_manager(target.dataset_json)
    classes = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    ending = target.dataset_json["file_ending"]
    rows = []
    for case in study.split.test:
        reference, prediction = (str(folder / f"{case}{ending}") for folder in (study.raw / "labelsTs", predictions))
        reader = target.plans_manager.image_reader_writer_class()
        for agreement in measure(reference, prediction, reader, classes, labels.ignore_label):
            values = asdict(agreement).items()
            rows.append({"case": case} | {key: None if value != value else value for key, value in values})  # NaN
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("cell")
    parser.add_argument("-device", required=True)
    parser.add_argument("-np", dest="processes", type=int, required=True)
    arguments = parser.parse_args()
    study = Study.read(arguments.study)
    cell = next((cell for cell in study.cells if cell.name == arguments.cell), None)
    if cell is None:
        sys.exit(
            f"Error: {arguments.study} holds no cell {arguments.cell}. Another command has added arms to the study at the same "
            "moment. Repeat the command that has this arm."
        )
    try:
        with ended_by_sigterm():
            run_cell(study, cell, arguments.device, arguments.processes)
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
