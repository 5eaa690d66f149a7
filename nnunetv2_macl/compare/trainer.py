"""Fine-tuning for comparison: arms differ in the weights they start from, and in nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import DataLoader, Dataset

from nnunetv2_macl.files import write_json
from nnunetv2_macl.nnunet import read_json
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL
from nnunetv2_macl.training.finetune_paper import nnUNetTrainerMACLPaper

# times that whole validation cases are predicted, evenly over the training, the last at its end
CURVE_POINTS = 10
CURVE_FILE = "curve.json"


class _ControlledTrainer(nnUNetTrainerMACL):
    """A training with a fixed budget, where every random number is decided by the seed.

    Batch n holds the same patches, augmented alike, in each arm, whatever the number of workers. ``configure_trial`` comes before
    the training; the weights are those that ``nnUNet_macl_weights`` names.
    """

    def configure_trial(self, *, epochs: int, iterations: int, rate: float, seed: int, from_scratch: bool) -> None:
        """Set length, highest learning rate and seed of the training, and whether it keeps the initial weights."""
        self.num_epochs = epochs
        self.iterations = iterations
        self.initial_lr = rate
        self.seed = seed
        self.from_scratch = from_scratch
        self.save_every = 10
        self.curve_epochs = sorted(
            {int(n) for n in np.linspace(epochs / CURVE_POINTS, epochs, CURVE_POINTS).round()} - {0}
        )
        self.curve: dict[int, list[list[float | None]]] = {}

    def initialize(self) -> None:
        torch.manual_seed(self.seed)
        super().initialize()
        self.num_iterations_per_epoch = self.iterations
        # nnU-Net's own proportion
        self.num_val_iterations_per_epoch = max(1, self.iterations // 5)

    def on_train_start(self) -> None:
        if self.from_scratch and not self.was_initialized:
            self.initialize()
        super().on_train_start()
        file = Path(self.output_folder) / CURVE_FILE
        if self.current_epoch and file.is_file():
            points = read_json(file, f"Remove {self.output_folder} to train again.")
            self.curve = {int(epoch): dice for epoch, dice in points.items() if int(epoch) <= self.current_epoch}
        self._extend_curve()

    def get_dataloaders(self) -> tuple[Iterator, Iterator]:
        """nnU-Net's own loaders, each batch from a seed of its own."""
        workers = get_allowed_n_proc_DA()
        with _environment(nnUNet_n_proc_DA="0"):
            single_threaded = super().get_dataloaders()
        training, validation = (augmenter.data_loader for augmenter in single_threaded)
        epochs = range(self.current_epoch, self.num_epochs)
        per_epoch = self.num_iterations_per_epoch
        steps = range(epochs.start * per_epoch, epochs.stop * per_epoch)
        # the same validation patches in each epoch: what changes is the network
        validation_steps = [*range(self.num_val_iterations_per_epoch)] * len(epochs)
        return (
            self._iterate(SeededBatches(training, (self.seed, 0)), steps, workers),
            self._iterate(SeededBatches(validation, (self.seed, 1)), validation_steps, (workers + 1) // 2),
        )

    def _iterate(self, batches: SeededBatches, steps: Any, workers: int) -> Iterator:
        pin_memory = self.device.type == "cuda"
        return iter(DataLoader(batches, None, sampler=steps, num_workers=workers, pin_memory=pin_memory))

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self._extend_curve()

    def save_checkpoint(self, filename: str) -> None:
        # the last one counts; the best on validation patches would be a choice more
        if Path(filename).name != "checkpoint_best.pth":
            super().save_checkpoint(filename)

    def _extend_curve(self) -> None:
        if self.current_epoch not in self.curve_epochs or self.current_epoch in self.curve:
            return
        self.curve[self.current_epoch] = self.validation_dice()
        write_json(self.curve, Path(self.output_folder) / CURVE_FILE)
        self.print_to_log_file(f"Whole validation cases were predicted after {self.current_epoch} epochs")

    def validation_dice(self) -> list[list[float | None]]:
        """Dice of each validation case and class, at the network's resolution; None where the class is in neither."""
        predictor = nnUNetPredictor(use_mirroring=False, device=self.device, allow_tqdm=False)
        predictor.manual_initialization(
            self.network, self.plans_manager, self.configuration_manager, None, self.dataset_json,
            type(self).__name__, self.inference_allowed_mirroring_axes,
        )  # fmt: skip
        labels = self.label_manager
        classes = labels.foreground_regions if labels.has_regions else labels.foreground_labels
        _, dataset = self.get_tr_and_val_datasets()
        self.set_deep_supervision_enabled(False)
        scores = []
        for case in dataset.identifiers:
            data, reference, _, _ = dataset.load_case(case)
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(data[:])))
            predicted = np.asarray(labels.convert_logits_to_segmentation(logits.cpu()))
            reference = np.asarray(reference[:])[0]
            ignored = reference == labels.ignore_label if labels.has_ignore_label else None
            scores.append(
                [
                    _dice(region_or_label_to_mask(reference, c), region_or_label_to_mask(predicted, c), ignored)
                    for c in classes
                ]
            )
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        return scores


class nnUNetTrainerMACLCompare(_ControlledTrainer):
    """Fine-tuning as nnU-Net trains: SGD with momentum."""


class nnUNetTrainerMACLCompareAdamW(_ControlledTrainer):
    """As nnU-Net trains, with AdamW."""

    finetuning_optimizer = "adamw"


class nnUNetTrainerMACLComparePaper(_ControlledTrainer, nnUNetTrainerMACLPaper):
    """Fine-tuning as the paper has it."""


# --finetuning
TRAINERS: dict[str, type[_ControlledTrainer]] = {
    "sgd": nnUNetTrainerMACLCompare,
    "adamw": nnUNetTrainerMACLCompareAdamW,
    "paper": nnUNetTrainerMACLComparePaper,
}


class SeededBatches(Dataset):
    """Item n is what nnU-Net's loader draws after every random number generator was seeded with n."""

    def __init__(self, loader: nnUNetDataLoader, seed: tuple[int, ...]) -> None:
        self.loader = loader
        self.seed = seed

    def __getitem__(self, step: int) -> dict[str, Any]:
        drawn = np.random.SeedSequence((*self.seed, step)).generate_state(2)
        np.random.seed(drawn[0])
        torch.manual_seed(int(drawn[1]))
        return self.loader.generate_train_batch()


def _dice(reference: np.ndarray, predicted: np.ndarray, ignored: np.ndarray | None) -> float | None:
    tp, fp, fn, _ = (int(n) for n in compute_tp_fp_fn_tn(reference, predicted, ignored))
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value
