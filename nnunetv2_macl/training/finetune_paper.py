"""Fine-tuning as in the paper, to repeat its experiments."""

from __future__ import annotations

import math
from typing import Any

import torch
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA
from torch import nn

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.training.finetune import nnUNetTrainerMACL
from nnunetv2_macl.training.user_errors import exit_on_user_error

# fraction of the initial learning rate in the last epoch
_LAST_SHARE = 0.01


class nnUNetTrainerMACLPaper(nnUNetTrainerMACL, nnUNetTrainerNoDA):
    """Fine-tunes as the paper's text says: Adam with a cosine from 5e-4 to 5e-6, cross-entropy, 100 epochs.

    An epoch has as many patches as there are training slices. There is no augmentation and no weight decay, which the text does
    not mention, but the published code has. The paper's network: ``nnUNetv2_macl_network DATASET paper``.

    Source: MACL, section IV; the authors' published implementation, https://github.com/stevezs315/MACL
    """

    finetuning_epochs = 100
    finetuning_lr = 5e-4

    def _build_loss(self) -> nn.Module:
        if self.label_manager.has_regions:
            raise UserError(
                f"{self.plans_manager.dataset_name} has overlapping regions, but the paper's cross-entropy needs one label per "
                "voxel. Fine-tune as nnU-Net does: -tr nnUNetTrainerMACL"
            )
        ignored = self.label_manager.ignore_label
        return RobustCrossEntropyLoss(ignore_index=-100 if ignored is None else ignored)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        # Without deep supervision only the last of these layers is used. On several GPUs torch requires a gradient of every
        # parameter that could have one.
        for layer in getattr(self.network.decoder, "seg_layers", [])[:-1]:
            layer.requires_grad_(False)
        optimizer = torch.optim.Adam(self.network.parameters(), self.initial_lr)
        return optimizer, _CosineLR(optimizer, self.initial_lr, self.num_epochs)

    @exit_on_user_error
    def initialize(self) -> None:
        self.enable_deep_supervision = False
        self.oversample_foreground_percent = 0.0
        super().initialize()
        if len(self.configuration_manager.patch_size) != 2:
            raise UserError(
                f"The paper fine-tunes in 2D, and {self.configuration_name} is 3D. Give -c 2d, or fine-tune as nnU-Net does: "
                "-tr nnUNetTrainerMACL"
            )
        dataset, _ = self.get_tr_and_val_datasets()
        slices = sum(dataset.load_case(case)[0].shape[1] for case in dataset.identifiers)
        # With several GPUs `batch_size` is the part of one GPU, which differs between GPUs if the batch is odd.
        self.num_iterations_per_epoch = max(1, round(slices / self.configuration_manager.batch_size))
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)


class _CosineLR:
    """A cosine schedule of the learning rate, which nnU-Net steps once per epoch."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float, epochs: int) -> None:
        self.optimizer, self.lr, self.epochs = optimizer, lr, epochs

    def step(self, epoch: int) -> None:
        fallen = (1 - math.cos(math.pi * min(1.0, epoch / max(1, self.epochs - 1)))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 - (1 - _LAST_SHARE) * fallen)
