"""Trainers for comparisons, in which arms differ only in their initial weights or in semi-supervised training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_macl.compare.study import Arm
from nnunetv2_macl.files import write_json
from nnunetv2_macl.nnunet import read_json
from nnunetv2_macl.semi_supervised.self_training import nnUNetTrainerMACLSelfTraining
from nnunetv2_macl.semi_supervised.trainer import nnUNetTrainerMACLSemi
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL
from nnunetv2_macl.training.finetune_paper import nnUNetTrainerMACLPaper
from nnunetv2_macl.training.seeded import SeededTraining

# number of times that whole validation cases are predicted, evenly over the training and at its end
CURVE_POINTS = 10
CURVE_FILE = "curve.json"


class _ControlledTrainer(SeededTraining, nnUNetTrainerMACL):
    """A trainer with a fixed budget.

    Batch n has the same labelled patches, with the same augmentation, in all arms except self-training, whose loader draws
    labelled and pseudo-labelled patches.

    Call ``configure_trial`` before the training. ``nnUNet_macl_weights`` names the initial weights.
    """

    def configure_trial(
        self, *, epochs: int, iterations: int, rate: float, seed: int, from_scratch: bool, optimizer: str = "sgd"
    ) -> None:
        """Set length, highest learning rate, seed and optimiser of the training, and whether it starts from scratch."""
        self.finetuning_optimizer = optimizer
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
        super().initialize()
        self.num_iterations_per_epoch = self.iterations
        # nnU-Net has 50 validation steps for 250 training steps
        self.num_val_iterations_per_epoch = max(1, self.iterations // 5)

    def on_train_start(self) -> None:
        super().on_train_start()
        file = Path(self.output_folder) / CURVE_FILE
        if self.current_epoch and file.is_file():
            points = read_json(file, f"Remove {self.output_folder} to train again.")
            self.curve = {int(epoch): dice for epoch, dice in points.items() if int(epoch) <= self.current_epoch}
        self._extend_curve()

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self._extend_curve()

    def save_checkpoint(self, filename: str) -> None:
        # only the final checkpoint is evaluated, because choosing the best one would be a further degree of freedom
        if Path(filename).name != "checkpoint_best.pth":
            super().save_checkpoint(filename)

    def _extend_curve(self) -> None:
        if self.current_epoch not in self.curve_epochs or self.current_epoch in self.curve:
            return
        self.curve[self.current_epoch] = self.validation_dice()
        write_json(self.curve, Path(self.output_folder) / CURVE_FILE)
        self.print_to_log_file(f"Predicted the validation cases after {self.current_epoch} epochs")

    def validation_dice(self) -> list[list[float | None]]:
        """Return the Dice of each validation case and class, at the network's resolution.

        None: the class is in neither segmentation.
        """
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
    """Fine-tunes like nnU-Net, with SGD or AdamW."""


class nnUNetTrainerMACLComparePaper(_ControlledTrainer, nnUNetTrainerMACLPaper):
    """Fine-tunes as in the paper."""


class nnUNetTrainerMACLCompareSemi(_ControlledTrainer, nnUNetTrainerMACLSemi):
    """Trains semi-supervised."""


class nnUNetTrainerMACLCompareSelf(_ControlledTrainer, nnUNetTrainerMACLSelfTraining):
    """Trains by self-training."""


def trainer_class(arm: Arm, finetuning: str) -> type[_ControlledTrainer]:
    """Return what trains the cells of an arm, by --finetuning."""
    if arm.teacher is not None:
        return nnUNetTrainerMACLCompareSelf
    if arm.semi is not None:
        return nnUNetTrainerMACLCompareSemi
    return nnUNetTrainerMACLComparePaper if finetuning == "paper" else nnUNetTrainerMACLCompare


def _dice(reference: np.ndarray, predicted: np.ndarray, ignored: np.ndarray | None) -> float | None:
    tp, fp, fn, _ = (int(n) for n in compute_tp_fp_fn_tn(reference, predicted, ignored))
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
