"""The pre-training stage as an nnU-Net trainer: nnU-Net runs the training and calls the methods of this class.

The other tasks of a run (checkpoints, log, pictures, signals ...) are in `nnunetv2_macl.training.callbacks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from time import time
from typing import Any

import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nnunetv2_macl import distributed
from nnunetv2_macl.data import Case
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import build_model, build_optimizer, build_schedule
from nnunetv2_macl.messages import for_log_file, show_any_character
from nnunetv2_macl.nnunet import DatasetConfiguration, lacks_wandb
from nnunetv2_macl.planning.derive import derive_or_load_plan
from nnunetv2_macl.planning.plan import MACLPlan, check_plan, current_plan, plan_file
from nnunetv2_macl.preprocessing.cases import Preprocessed
from nnunetv2_macl.preprocessing.sources import training_cases
from nnunetv2_macl.processes import environment
from nnunetv2_macl.recipe import Recipe
from nnunetv2_macl.training.callbacks.base import Callback
from nnunetv2_macl.training.callbacks.measuring import BadBatches, CollapseMonitor, EpochLog, Probes
from nnunetv2_macl.training.callbacks.outputs import Export, Pictures
from nnunetv2_macl.training.callbacks.saving import Checkpoints, RunFolder, StopAndSave
from nnunetv2_macl.training.commands import command_to_go_on
from nnunetv2_macl.training.epoch_log import Epoch, log_keys
from nnunetv2_macl.training.inputs import batches, find_cases, load_start_weights
from nnunetv2_macl.training.run_folder import PLAN_COPY, RunLock, archive_previous_run
from nnunetv2_macl.training.step import TrainingStep
from nnunetv2_macl.training.user_errors import (
    exit_on_refused_write,
    exit_on_user_error,
    explain_run_errors,
    explain_step_errors,
    refuse_pretrained_weights,
)


class nnUNetTrainerMACLPretrain(nnUNetTrainer):
    """Pre-trains encoder and partial decoder on images without their labels, with the method of a recipe.

    All settings are read from the MACL plan, which is derived if it is missing. ``fold`` selects the validation cases that are
    left out: those of fold F, or none for ``all``. With ``--c`` the run keeps the plan that it began with.
    """

    # seconds between two checkpoints, so a crash costs at most this much work
    save_every_seconds: float = 300.0
    # nnU-Net sets these attributes and does not declare them.
    is_ddp: bool
    current_epoch: int
    grad_scaler: torch.amp.GradScaler | None
    # `initialize` and `on_train_start` set these.
    macl_configuration: DatasetConfiguration
    macl_plan: MACLPlan
    recipe: Recipe
    step: TrainingStep
    data: Preprocessed

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, which it inspects
    ) -> None:
        show_any_character()
        self._continue_training = bool(plans.get("continue_training"))
        if lacks_wandb():
            raise SystemExit(
                "\nError: nnUNet_wandb_enabled is set, but W&B is not installed. Type: pip install wandb\nor train without it: "
                "unset nnUNet_wandb_enabled"
            )
        # Only rank 0 writes to W&B. nnU-Net's constructor removes the files of W&B in the folder, and another run may be
        # writing them. Then `initialize` refuses this run.
        model = f"{type(self).__name__}__{plans['plans_name']}__{configuration}"
        is_alone = not RunLock(Path(str(nnUNet_results), plans["dataset_name"], model, f"fold_{fold}")).holder()
        one_logger = {} if distributed.rank() == 0 and is_alone else {"nnUNet_wandb_enabled": "0"}
        with exit_on_refused_write(self), environment(**one_logger):
            super().__init__(plans, configuration, fold, dataset_json, device)
        self._set_local_device(device)
        self.num_val_iterations_per_epoch = 0
        self.enable_deep_supervision = False
        self.steps_done = 0
        self.labelled_cases: list[Case] = []
        self.run_folder = RunFolder(self)
        self.epoch_log = EpochLog(self)
        self.stop_and_save = StopAndSave(self)
        self.probes = Probes(self)
        self.collapse = CollapseMonitor(self)
        self.checkpoints = Checkpoints(self)
        self.export = Export(self)
        # This is the order of the log and of the files. `on_exit` has the reverse order, so the lock is released last.
        self.callbacks: list[Callback] = [
            self.run_folder,
            self.epoch_log,
            BadBatches(self),
            self.stop_and_save,
            self.probes,
            self.collapse,
            self.checkpoints,
            Pictures(self),
            self.export,
        ]

    def _set_local_device(self, device: torch.device) -> None:
        """Set the device of this rank. `TrainingStep` synchronises the ranks, so nnU-Net must not wrap the network in DDP."""
        if not self.is_ddp:
            return
        self.is_ddp = False
        self.device = torch.device("cuda", distributed.local_rank()) if device.type == "cuda" else device
        if self.device.type != "cuda":
            self.grad_scaler = None

    @property
    def log_of_epochs(self) -> dict[str, list]:
        """Return nnU-Net's log: a list with one value per epoch, by key."""
        return self.logger.local_logger.my_fantastic_logging

    def command_to_go_on(self) -> str:
        """Return the command that continues this run."""
        return command_to_go_on(self.macl_configuration, self.fold, self.device.type, type(self).__name__)

    # --- nnU-Net sets up the training --------------------------------------------------------------------------------------

    @exit_on_user_error
    def initialize(self) -> None:
        """nnU-Net builds network, optimiser and loss; before that, we lock the folder and read the MACL plan."""
        with self._release_lock_on_error():
            self.macl_configuration = DatasetConfiguration.from_plans(
                self.plans_manager, self.configuration_name, self.dataset_json
            )
            refuse_pretrained_weights(self)
            with distributed.rank_zero_first() as first:
                if first:
                    for callback in self.callbacks:
                        callback.on_initialize()
                    # raises a UserError now, and not after minutes, if nnU-Net has not preprocessed the cases
                    training_cases(self.macl_configuration)
            self.macl_plan = self._load_plan()
            self.recipe = self.macl_plan.get_recipe()
            self.num_epochs = self.recipe.num_epochs
            self.num_iterations_per_epoch = self.recipe.num_iterations_per_epoch
            self.initial_lr = self.recipe.learning_rate
            self.weight_decay = self.recipe.weight_decay
            torch.manual_seed(self.recipe.seed)
            # nnU-Net's logger accepts only the keys that it has, and one value for each epoch.
            keys = log_keys(self.recipe, self.probes.keys)
            self.logger.local_logger.my_fantastic_logging = {key: [] for key in keys}
            super().initialize()
            self.step = self._build_step()
            if not self._continue_training:
                # W&B refuses to change what the run has recorded.
                self.logger.update_config({"macl_plan": self.macl_plan.as_json()})

    @contextlib.contextmanager
    def _release_lock_on_error(self) -> Iterator[None]:
        """Release the run lock if the body raises a UserError."""
        try:
            yield
        except UserError:
            self.run_folder.on_exit()
            raise

    def _load_plan(self) -> MACLPlan:
        """Return the MACL plan.

        nnUNetv2_train_macl_pretrain hands its plan over in the environment. nnU-Net's own command hands over none. Then this is
        the plan of the continued run, or else the file next to nnU-Net's plan, which is derived if it is missing.
        """
        file = Path(self.output_folder) / PLAN_COPY
        if not (self._continue_training and file.is_file()):
            file = plan_file(self.macl_configuration)
            with distributed.rank_zero_first() as first:
                if first and not file.is_file():
                    derive_or_load_plan(self.macl_configuration)
        plan = current_plan(file)
        check_plan(plan, self.macl_configuration, file, of_a_run=file.name == PLAN_COPY)
        return plan

    def _build_step(self) -> TrainingStep:
        return TrainingStep(
            self.network, self.optimizer, self.lr_scheduler, self.grad_scaler, self.macl_plan, self.device
        )

    def build_network_architecture(  # type: ignore[override]
        self,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net builds its segmentation network; we put the pre-training network around it."""
        # Without labels, the second stage of a cascade has no segmentation of the first stage as an input.
        image_channels = len(self.macl_configuration.channel_names)
        unet = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, image_channels, num_output_channels, enable_deep_supervision
        )
        network = build_model(self.macl_configuration, self.macl_plan.geometry, self.recipe, unet)
        if distributed.world_size() > 1:
            return distributed.synchronise_batch_norm(network, self.device.type)
        return network

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """nnU-Net asks for optimiser and schedule; the recipe names them."""
        optimizer = build_optimizer(self.network, self.recipe)
        return optimizer, build_schedule(optimizer, self.recipe)

    def _build_loss(self) -> None:
        """nnU-Net builds a loss; we do nothing, because the methods have their own losses."""

    def _set_batch_size_and_oversample(self) -> None:
        """nnU-Net divides the batch among the ranks; we do too, and the ranks draw the batch that one process would draw."""
        first, last = distributed.local_slice(self.macl_plan.batch_size)
        if self.macl_plan.batch_size < 2 * distributed.world_size():
            raise UserError(
                f"A batch of {self.macl_plan.batch_size} over {distributed.world_size()} GPUs leaves fewer than 2 patches per "
                f"GPU. Type: -batch_size {2 * distributed.world_size()} or more, or a smaller -num_gpus."
            )
        self.batch_size = last - first

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """nnU-Net switches the outputs of its decoder; we do nothing, because ours has no segmentation layers."""

    def plot_network_architecture(self) -> None:
        """nnU-Net draws the network; we do nothing, because the pre-training model has no `forward` from one image to outputs."""

    # --- nnU-Net trains ----------------------------------------------------------------------------------------------------

    @exit_on_user_error
    def run_training(self) -> None:
        """nnU-Net runs all epochs; we explain its errors, and clean up in any case."""
        with contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.on_exit)
            stack.callback(self._stop_workers)
            with explain_run_errors(self):
                super().run_training()

    def _stop_workers(self) -> None:
        if self.dataloader_train is not None:
            self.dataloader_train.close()  # its workers ignore signals

    def on_train_start(self) -> None:
        """nnU-Net prepares data and folder; before that, we load a checkpoint or weights, and preprocess images."""
        if not self.was_initialized:
            self.initialize()
        if self._continue_training and not self.checkpoints.is_resumed:
            # nnU-Net looked only for its own checkpoint names, so look for ours.
            self.checkpoints.continue_run()
        data = None
        with distributed.rank_zero_first() as first:
            if first:
                if not self.checkpoints.is_resumed:
                    load_start_weights(self)
                data = self._prepare_data()
                if self.disable_checkpointing and list(Path(self.output_folder).glob("*.pth")):
                    raise UserError(
                        f"{self.output_folder} holds checkpoints or weights. A new run moves them to an archive, and with "
                        "--disable_checkpointing it writes no new ones. Leave out --disable_checkpointing."
                    )
                if not self.checkpoints.is_resumed:
                    # last, because the initial weights may be those of the earlier run, and a run without data must not move it
                    archive_previous_run(Path(self.output_folder), keep=Path(self.log_file), log=self.print_to_log_file)
        # Only rank 0 looks for images, because other ranks might find other images readable.
        self.data = distributed.broadcast_object(data)
        if distributed.rank() == 0:
            super().on_train_start()
        else:
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        distributed.broadcast_module(self.step.model)
        for callback in self.callbacks:
            callback.on_train_start()

    def _prepare_data(self) -> Preprocessed:
        self.labelled_cases, cases = find_cases(self)
        return cases

    def get_dataloaders(self) -> tuple[Any, None]:
        """nnU-Net asks for training and validation batches; we return no validation batches, because there are no labels."""
        return batches(self), None

    @property
    def batch_bytes(self) -> int:
        """Return the size of this rank's part of a batch, in bytes."""
        return self.macl_plan.batch_bytes(len(self.macl_configuration.channel_names)) // distributed.world_size()

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """nnU-Net prints on every rank; all ranks print the same, so we print on rank 0 only."""
        also_print_to_console = also_print_to_console and distributed.rank() == 0
        words = map(for_log_file, args)
        super().print_to_log_file(*words, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)

    def on_epoch_start(self) -> None:
        """nnU-Net logs the start of the epoch; we leave that out when a stopped epoch continues."""
        if len(self.log_of_epochs["epoch_start_timestamps"]) <= self.current_epoch:
            super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        """nnU-Net prepares the epoch; we leave out the steps that were done before the run was stopped."""
        # nnU-Net also steps the learning rate here; `TrainingStep` does so after each step
        self.network.train()
        self.num_iterations_per_epoch = self.recipe.num_iterations_per_epoch - self.epoch_log.sums.steps
        for callback in self.callbacks:
            callback.on_epoch_start()

    def train_step(self, batch: dict) -> dict[str, float]:
        """nnU-Net asks for one step; `TrainingStep` computes it."""
        with explain_step_errors(self):
            for callback in self.callbacks:
                callback.on_step_start(batch)
            measured = self.step(batch, self.steps_done)
        self.steps_done += 1
        for callback in self.callbacks:
            callback.on_step_end(batch, measured)
        return measured

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        """nnU-Net logs the mean loss; we use our own sums, because ``train_outputs`` lacks the steps before a restart."""
        epoch = Epoch(self.current_epoch, self.num_epochs, self.macl_plan.batch_size, self.epoch_log.sums, self.recipe)
        for callback in self.callbacks:
            callback.on_train_epoch_end(epoch)

    def on_validation_epoch_start(self) -> None:
        """nnU-Net prepares the validation; we do nothing, because there are no labels to validate on."""

    def on_validation_epoch_end(self, val_outputs: list) -> None:
        """nnU-Net logs the validation; we do nothing, because there are no labels to validate on."""

    def on_epoch_end(self) -> None:
        """nnU-Net logs, saves and draws; our callbacks save and draw."""
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        is_last = self.current_epoch + 1 == self.num_epochs
        for callback in self.callbacks:
            callback.on_epoch_end(is_last=is_last)
        # Rank 0 may still be measuring, saving or drawing.
        distributed.wait_for_all()
        self.current_epoch += 1
        if not is_last:
            self.collapse.stop_if_it_lasts()

    def on_train_end(self) -> None:
        """nnU-Net writes the final checkpoint; we export the weights and write the report."""
        super().on_train_end()
        for callback in self.callbacks:
            callback.on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net predicts the validation cases; the next step here is fine-tuning, so we print its command."""
        self.export.tell_next_command()
        self.run_folder.on_exit()  # with --val there was no training, which releases the lock at its end

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net writes its checkpoint; we write ours, completely or not at all."""
        self.checkpoints.save(Path(filename))

    @exit_on_user_error
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net loads the named checkpoint; we load the newest good checkpoint of the run's folder."""
        if not self.was_initialized:
            self.initialize()
        with self._release_lock_on_error():
            self.checkpoints.continue_run()
