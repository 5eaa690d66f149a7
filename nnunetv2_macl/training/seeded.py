"""Seed nnU-Net's training, so that each batch is a function of the seed and the number of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import DataLoader, Dataset

from nnunetv2_macl.processes import environment


class BatchLoader(Protocol):
    """A loader that draws with NumPy's and torch's global random number generators, as nnU-Net's data loader does."""

    def generate_train_batch(self) -> dict[str, Any]: ...


class SeededTraining(nnUNetTrainer):
    """A trainer whose seed determines the initial weights, the patches and their augmentation.

    Batch n has the same patches with the same augmentation for any number of workers, and also after the training was
    interrupted and continued.
    """

    seed: int = 0

    def initialize(self) -> None:
        torch.manual_seed(self.seed)
        super().initialize()

    def get_dataloaders(self) -> tuple[Iterator, Iterator]:
        """Return nnU-Net's loaders for training and validation, with a seed for each batch."""
        workers = get_allowed_n_proc_DA()
        with environment(nnUNet_n_proc_DA="0"):
            single_threaded = super().get_dataloaders()
        training, validation = (augmenter.data_loader for augmenter in single_threaded)
        epochs = range(self.current_epoch, self.num_epochs)
        per_epoch = self.num_iterations_per_epoch
        steps = range(epochs.start * per_epoch, epochs.stop * per_epoch)
        # The validation patches are the same in each epoch, so that only the network changes between epochs.
        validation_steps = [*range(self.num_val_iterations_per_epoch)] * len(epochs)
        return (
            self._iterate(SeededBatches(self.training_loader(training), (self.seed, 0)), steps, workers),
            self._iterate(SeededBatches(validation, (self.seed, 1)), validation_steps, (workers + 1) // 2),
        )

    def on_train_end(self) -> None:
        super().on_train_end()
        # ends the workers of the loaders
        self.dataloader_train = self.dataloader_val = None

    def training_loader(self, loader: Any) -> BatchLoader:
        """Return the loader of the training batches. A subclass may replace nnU-Net's ``loader``."""
        return loader

    def _iterate(self, batches: SeededBatches, steps: Sequence[int], workers: int) -> Iterator:
        pin_memory = self.device.type == "cuda"
        return iter(DataLoader(batches, None, sampler=steps, num_workers=workers, pin_memory=pin_memory))


class SeededBatches(Dataset):
    """A data set whose item n is the batch that a loader draws after all generators were seeded with n."""

    def __init__(self, loader: BatchLoader, seed: tuple[int, ...]) -> None:
        self.loader = loader
        self.seed = seed

    def __getitem__(self, step: int) -> dict[str, Any]:
        drawn = np.random.SeedSequence((*self.seed, step)).generate_state(2)
        np.random.seed(drawn[0])
        torch.manual_seed(int(drawn[1]))
        return self.loader.generate_train_batch()
