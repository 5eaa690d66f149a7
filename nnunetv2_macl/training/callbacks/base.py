"""The interface of the callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_macl.training.epoch_log import Epoch

if TYPE_CHECKING:
    from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain


class Callback:
    """One task of a run besides training. Each method does nothing unless a subclass overrides it.

    The trainer calls a method of all its callbacks in the order of its list, and `on_exit` in the reverse order. All ranks call
    all methods except `on_initialize`, so a callback that writes a file checks its rank.

    Args:
        trainer: The trainer of the run.
    """

    def __init__(self, trainer: nnUNetTrainerMACLPretrain) -> None:
        self.trainer = trainer
        self.folder = Path(trainer.output_folder)

    def on_initialize(self) -> None:
        """Called on rank 0 before the run reads or writes anything in its folder."""

    def on_train_start(self) -> None:
        """Called when data and network are ready."""

    def on_epoch_start(self) -> None:
        """Called before the first step of an epoch, and again when a stopped epoch continues."""

    def on_step_start(self, batch: dict[str, Any]) -> None:
        """Called before a step is computed."""

    def on_step_end(self, batch: dict[str, Any], measured: dict[str, float]) -> None:
        """Called when the weights have been updated, with the losses and statistics of the whole batch by name."""

    def on_train_epoch_end(self, epoch: Epoch) -> None:
        """Called after the last step of an epoch, for everything that measures the epoch."""

    def on_epoch_end(self, *, is_last: bool) -> None:
        """Called when the epoch has been measured, for everything that writes files."""

    def on_train_end(self) -> None:
        """Called after the last epoch, when the final checkpoint has been written."""

    def on_exit(self) -> None:
        """Called when the run ends for any reason, also by an error."""

    def state(self) -> dict[str, Any]:
        """Return the state of this callback for the checkpoint, by keys of the checkpoint."""
        return {}

    def load_state(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state that `state` has put into a checkpoint."""
