"""Callbacks that monitor how a run learns: its log, steps without a finite gradient, quality of the features, collapse."""

from __future__ import annotations

import math
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nnunetv2_macl import checkpoints, distributed, monitoring, probes
from nnunetv2_macl.data import PretrainingBatches
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.messages import progress_bar
from nnunetv2_macl.training.callbacks.base import Callback
from nnunetv2_macl.training.epoch_log import CollapseWatch, Epoch, EpochSums
from nnunetv2_macl.training.run_folder import PLAN_COPY

if TYPE_CHECKING:
    from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain

# A run ends after this many steps in a row without a finite loss or gradient; see `TrainingStep.skipped_in_a_row`.
MAX_SKIPPED_STEPS = 10
BAD_BATCH = "bad_batch.pth"
# The first steps on a GPU compile the network and choose convolutions, so their time says nothing about the speed.
_WARM_UP_STEPS = 3


class EpochLog(Callback):
    """Sums up the steps of an epoch, shows a progress bar, and logs the epoch."""

    def __init__(self, trainer: nnUNetTrainerMACLPretrain) -> None:
        super().__init__(trainer)
        self.sums = EpochSums()
        self._steps_since_start = 0
        self._timed_until: float | None = None
        self._between_epochs: list[float] = []
        self._bar: tqdm | None = None

    def on_train_start(self) -> None:
        trainer, data = self.trainer, self.trainer.data
        if trainer.macl_configuration.is_cascaded:
            trainer.print_to_log_file(
                f"{trainer.configuration_name} is the second stage of a cascade. Pre-training covers the image channels. "
                "Fine-tuning starts with new weights for the inputs from the first stage"
            )
        trainer.print_to_log_file(
            f"Pre-training on {len(data.cases)} images, {trainer.num_epochs} epochs of {trainer.num_iterations_per_epoch} "
            f"steps of {trainer.macl_plan.batch_size} patches; left out as unreadable: {len(data.skipped)}"
        )

    def on_epoch_start(self) -> None:
        trainer, now = self.trainer, perf_counter()
        if len(trainer.log_of_epochs["lrs"]) <= trainer.current_epoch:  # else a stopped epoch continues
            trainer.logger.log("lrs", trainer.optimizer.param_groups[0]["lr"], trainer.current_epoch)
        if self._timed_until is not None:
            self._between_epochs.append(now - self._timed_until)
        self._timed_until = now
        self._bar = progress_bar(
            total=trainer.recipe.num_iterations_per_epoch,
            initial=self.sums.steps,
            desc=f"epoch {trainer.current_epoch}",
            unit="step",
            leave=False,
            hidden=distributed.rank() != 0,
        )

    def on_step_end(self, batch: dict[str, Any], measured: dict[str, float]) -> None:
        assert self._timed_until is not None and self._bar is not None
        now = perf_counter()
        is_warm = self.trainer.device.type != "cuda" or self._steps_since_start >= _WARM_UP_STEPS
        self.sums.add(measured, skipped=self.trainer.step.was_skipped)
        self.sums.add_time(now - self._timed_until, is_warm=is_warm)
        self._steps_since_start += 1
        self._timed_until = now
        self._bar.update()

    def on_train_epoch_end(self, epoch: Epoch) -> None:
        self.close_bar()
        probed = self.trainer.probes.keys
        keys = [key for key in self.trainer.log_of_epochs if key not in probed]
        for key, value in epoch.log_values(keys).items():
            self.trainer.logger.log(key, value, epoch.number)
        between = sum(self._between_epochs) / len(self._between_epochs) if self._between_epochs else 0.0
        self.trainer.print_to_log_file(epoch.line(between))

    def on_epoch_end(self, *, is_last: bool) -> None:
        self.sums = EpochSums()

    def close_bar(self) -> None:
        """Remove the progress bar before a message is printed."""
        if self._bar is not None:
            self._bar.close()

    def state(self) -> dict[str, Any]:
        return {"epoch_sums": asdict(self.sums)}

    def load_state(self, checkpoint: dict[str, Any]) -> None:
        self.sums = EpochSums(**checkpoint["epoch_sums"])


class BadBatches(Callback):
    """Ends a run whose steps have no finite loss or gradient, and keeps the last batch."""

    def on_step_end(self, batch: dict[str, Any], measured: dict[str, float]) -> None:
        if self.trainer.step.skipped_in_a_row < MAX_SKIPPED_STEPS:
            return
        self.trainer.epoch_log.close_bar()
        rank = distributed.rank()
        file = self.folder / (f"rank{rank}_{BAD_BATCH}" if rank else BAD_BATCH)
        images = {key: batch[key] for key in ("data", "positions", "cases")}
        checkpoints.save({**images, "step": self.trainer.steps_done - 1, "measured": measured}, file)
        raise UserError(
            f"The run was stopped, because {MAX_SKIPPED_STEPS} steps in a row had no finite loss or gradient (loss "
            f"{measured['total']:g}). The last batch was saved to {file}. Checkpoints from before these steps are intact. Check "
            "the images that the file names, or start a new run with a smaller learning_rate (now "
            f"{self.trainer.recipe.learning_rate:g})."
        )


class Probes(Callback):
    """Measures the features in the epochs that the recipe asks for, and after the last epoch."""

    def __init__(self, trainer: nnUNetTrainerMACLPretrain) -> None:
        super().__init__(trainer)
        self._probe: probes.Probe | None = None

    @property
    def keys(self) -> list[str]:
        """Return the keys of nnU-Net's log that this callback fills."""
        trainer = self.trainer
        return probes.probe_keys(len(trainer.macl_configuration.strides)) if trainer.recipe.probe_every else []

    def on_train_epoch_end(self, epoch: Epoch) -> None:
        every, number = self.trainer.recipe.probe_every, epoch.number + 1
        is_due = every and (number % every == 0 or number == epoch.epochs)
        values = self._measure() if is_due and distributed.rank() == 0 else {}
        for key in self.keys:
            self.trainer.logger.log(key, float(values.get(key, math.nan)), epoch.number)
        if values:
            self.trainer.print_to_log_file(probes.as_words(values))

    def _measure(self) -> dict[str, float]:
        trainer, plan = self.trainer, self.trainer.macl_plan
        if self._probe is None:
            # Rank 0 measures alone, so it reads whole batches.
            batches = PretrainingBatches(trainer.data.cases, plan.sampling, (0, plan.batch_size), trainer.step.steps)
            self._probe = probes.Probe(
                trainer.macl_configuration, trainer.labelled_cases, batches, plan.patch_size, trainer.recipe.seed
            )
        return self._probe.measure(trainer.step)


class CollapseMonitor(Callback):
    """Warns when the run has collapsed, and ends it when the collapse lasts as long as the recipe allows."""

    def __init__(self, trainer: nnUNetTrainerMACLPretrain) -> None:
        super().__init__(trainer)
        self.watch = CollapseWatch()

    def on_train_epoch_end(self, epoch: Epoch) -> None:
        trainer = self.trainer
        losses = {name: trainer.log_of_epochs[f"train_losses/{name}"] for name in trainer.recipe.losses}
        before = {name: values[-2] for name, values in losses.items() if len(values) > 1}
        reason = monitoring.collapse_reason(
            trainer.recipe, trainer.macl_plan.batch_size, epoch.sums.means(), before, trainer.steps_done
        )
        if message := self.watch.update(reason, trainer.recipe):
            trainer.print_to_log_file(message)

    def stop_if_it_lasts(self) -> None:
        """Write a checkpoint and raise UserError if the run has been collapsed for as long as the recipe allows."""
        patience = self.trainer.recipe.collapse_patience
        if not (patience and self.watch.reason and self.watch.epochs >= patience):
            return
        self.trainer.checkpoints.save_latest()
        how_to_continue = ""
        if self.trainer.checkpoints.latest.is_file():
            how_to_continue = (
                f" To continue anyway, set collapse_patience to 0 in {self.folder / PLAN_COPY} and type:\n"
                f"    {self.trainer.command_to_go_on()}"
            )
        raise UserError(
            f"The run was stopped, because it was collapsed for {self.watch.epochs} epochs: {self.watch.reason}. "
            f"{monitoring.collapse_advice(self.trainer.recipe)}{how_to_continue}"
        )

    def state(self) -> dict[str, Any]:
        return {"collapse": asdict(self.watch), "collapsed": self.watch.reason}

    def load_state(self, checkpoint: dict[str, Any]) -> None:
        self.watch = CollapseWatch(**checkpoint["collapse"])
