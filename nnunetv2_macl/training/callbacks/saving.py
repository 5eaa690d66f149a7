"""Callbacks that make a run safe: they lock its folder, stop it on a signal, and write and load its checkpoints."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

from nnunetv2_macl import checkpoints, distributed
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import load_optimizer
from nnunetv2_macl.files import remove_temporary
from nnunetv2_macl.nnunet import GROUP_VARIABLE, checksum
from nnunetv2_macl.patients import group_regex
from nnunetv2_macl.planning.plan import write_plan
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.callbacks.base import Callback
from nnunetv2_macl.training.inputs import cases_by_dataset
from nnunetv2_macl.training.run_folder import PLAN_COPY, RunLock, write_cases
from nnunetv2_macl.training.signals import Signals

if TYPE_CHECKING:
    from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain


class RunFolder(Callback):
    """Locks the folder of the run, so that a second run cannot write into it, and records what the run trains on."""

    def __init__(self, trainer: nnUNetTrainerMACLPretrain) -> None:
        super().__init__(trainer)
        self.lock = RunLock(self.folder)

    def on_initialize(self) -> None:
        self.lock.acquire()
        remove_temporary(self.folder)

    def on_train_start(self) -> None:
        trainer = self.trainer
        if distributed.rank() != 0:
            return
        write_plan(trainer.macl_plan, self.folder / PLAN_COPY)
        if trainer.macl_plan.recipe_source:
            trainer.print_to_log_file(f"Recipe: {trainer.macl_plan.recipe_source}")
        cases = cases_by_dataset(trainer.macl_configuration, trainer.data.cases)
        write_cases(self.folder, cases, resumed=trainer.checkpoints.is_resumed)

    def on_exit(self) -> None:
        self.lock.release()


class StopAndSave(Callback):
    """Stops the run, or writes a checkpoint, when a signal asks for it."""

    def __init__(self, trainer: nnUNetTrainerMACLPretrain) -> None:
        super().__init__(trainer)
        self.signals = Signals()

    def on_train_start(self) -> None:
        self.signals.install()

    def on_step_end(self, batch: dict[str, Any], measured: dict[str, float]) -> None:
        stop, save = self.signals.pending_requests()
        if stop or save:
            self.trainer.checkpoints.save_latest()
        if stop:
            self.stop()

    def stop(self) -> NoReturn:
        """Print the command that continues the run, and exit with the code of the signal, so that no next command starts.

        Of several ranks each exits with code 0, because their launcher would report another code as a failure.
        """
        trainer = self.trainer
        trainer.epoch_log.close_bar()
        kept = "No checkpoint was written: checkpointing is disabled."
        if not trainer.disable_checkpointing:
            kept = f"To continue, type:\n    {trainer.command_to_go_on()}"
        trainer.print_to_log_file(f"Stopped as asked, after {trainer.steps_done} of {trainer.step.steps} steps. {kept}")
        stopped_by = self.signals.stopped_by
        raise SystemExit(0 if distributed.world_size() > 1 or stopped_by is None else 128 + stopped_by)

    def on_exit(self) -> None:
        self.signals.restore()


class Checkpoints(Callback):
    """Writes the checkpoints of the run, and continues it from the newest good one."""

    def __init__(self, trainer: nnUNetTrainerMACLPretrain) -> None:
        super().__init__(trainer)
        self.latest = self.folder / resume.LATEST
        self._saved_at = perf_counter()
        # A continued run begins with this epoch: the current one while it is trained, then the next one.
        self._next_epoch = 0
        self._resumed_images: str | None = None

    @property
    def is_resumed(self) -> bool:
        """Return whether the run continues from a checkpoint."""
        return self._resumed_images is not None

    def on_train_start(self) -> None:
        if self._resumed_images not in (None, self._images()):
            self.trainer.print_to_log_file(
                "WARNING: the images have changed since the run began. The run continues with the present images"
            )

    def on_epoch_start(self) -> None:
        self._next_epoch = self.trainer.current_epoch

    def on_step_end(self, batch: dict[str, Any], measured: dict[str, float]) -> None:
        if self._is_due():
            self.save_latest()

    def on_epoch_end(self, *, is_last: bool) -> None:
        self._next_epoch = self.trainer.current_epoch + 1
        # The first epoch is saved early, because that shows whether a checkpoint can be written.
        if not is_last and (self._next_epoch == 1 or self._is_due()):
            self.save_latest()

    def _is_due(self) -> bool:
        return perf_counter() - self._saved_at >= self.trainer.save_every_seconds

    def save_latest(self) -> None:
        self.trainer.save_checkpoint(str(self.latest))

    def save_between_steps(self) -> None:
        """Save a checkpoint if any step is done. No step is half done while the run waits for a batch."""
        if self.trainer.steps_done:
            self.save_latest()

    def save(self, file: Path) -> None:
        """Write everything that a continued run needs. The file loads with ``weights_only=True``.

        Raises:
            UserError: The file could not be written; an earlier one is unchanged.
        """
        trainer = self.trainer
        self._saved_at = perf_counter()
        if distributed.rank() != 0:
            return
        if trainer.disable_checkpointing:
            trainer.print_to_log_file("No checkpoint was written: checkpointing is disabled.")
            return
        if file.name == resume.LATEST:
            resume.rotate_checkpoint(file)
        scaler = trainer.grad_scaler
        content = {
            "format_version": resume.FORMAT_VERSION,
            "kind": resume.KIND,
            "run": self._run,
            "network_weights": trainer.step.model.state_dict(),
            "optimizer_state": trainer.optimizer.state_dict(),
            "lr_scheduler_state": {"last_epoch": trainer.steps_done},
            "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
            "logging": trainer.logger.get_checkpoint(),
            "current_epoch": self._next_epoch,
            # There is no state of a random generator, because batches, views and dropout are functions of (seed, step).
            "step": trainer.steps_done,
        }
        for callback in trainer.callbacks:
            content |= callback.state()
        checkpoints.save(content | {"trainer_name": type(trainer).__name__}, file)

    def state(self) -> dict[str, Any]:
        return {"images": self._images(), "group_regex": group_regex()}

    def load_state(self, checkpoint: dict[str, Any]) -> None:
        """Take over the images of a checkpoint.

        Raises:
            UserError: The run began with other patients, so images of validation patients might be trained on from now on.
        """
        self._resumed_images = checkpoint["images"]
        began = checkpoint.get("group_regex", group_regex())  # a checkpoint of an earlier version has none
        if self.trainer.fold != "all" and began != group_regex():
            command = f"export {GROUP_VARIABLE}={shlex.quote(began)}" if began else f"unset {GROUP_VARIABLE}"
            raise UserError(
                f"The run in {self.folder} began with {GROUP_VARIABLE} '{began or ''}', and this variable is now "
                f"'{group_regex() or ''}'. Type: {command}"
            )

    def _images(self) -> str:
        return checksum([case.name for case in self.trainer.data.cases])

    @property
    def _run(self) -> dict[str, Any]:
        """Return what identifies the run of a checkpoint."""
        # These settings may change when a run continues: the parts in which a batch is computed, what happens to unreadable
        # images, and the patience with a collapse. Earlier versions did not record how the recipe was asked for.
        plan = self.trainer.macl_plan
        plan = replace(
            plan,
            patches_at_once=plan.batch_size,
            skip_unreadable=False,
            recipe=plan.recipe | {"collapse_patience": 0},
            recipe_name=None,
            settings=None,
        )
        return {"fold": str(self.trainer.fold), "macl_plan": plan.as_json()}

    def continue_run(self) -> None:
        """Continue from the newest good checkpoint in the folder, if there is one.

        Raises:
            UserError: There are checkpoints and none of them is good.
        """
        arguments = (self.folder, self._run, self.trainer.print_to_log_file)
        # Rank 0 renames damaged checkpoints before the other ranks look for a good one.
        with distributed.rank_zero_first() as first:
            checkpoint = resume.load_checkpoint(*arguments) if first else None
        if distributed.rank() != 0:
            checkpoint = resume.load_checkpoint(*arguments)
        if checkpoint is not None:
            self.restore(checkpoint)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the content of a checkpoint."""
        trainer, scaler = self.trainer, self.trainer.grad_scaler
        trainer.step.model.load_state_dict(resume.weights_of(checkpoint))
        load_optimizer(trainer.optimizer, checkpoint["optimizer_state"])
        trainer.steps_done = trainer.lr_scheduler.last_epoch = checkpoint["step"]
        if scaler is not None and checkpoint["grad_scaler_state"] is not None:
            scaler.load_state_dict(checkpoint["grad_scaler_state"])
        trainer.logger.load_checkpoint(checkpoint["logging"])
        trainer.current_epoch = self._next_epoch = checkpoint["current_epoch"]
        for callback in trainer.callbacks:
            callback.load_state(checkpoint)
