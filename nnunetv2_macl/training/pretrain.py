"""The pre-training stage as a nnU-Net trainer: nnU-Net's run loop, folders, logging and --c around the MACL step."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from nnunetv2_macl import checkpoints, distributed, monitoring, probes
from nnunetv2_macl.building import build_model, build_optimizer, load_optimizer
from nnunetv2_macl.data import (
    Case,
    PretrainingBatches,
    hear_no_more_of_workers,
    load_batches,
    plan_reading_here,
    too_little_shared_memory,
    worker_was_killed,
)
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import CannotWriteError, cannot_write, is_refused_write, remove_temporary
from nnunetv2_macl.folds import check_fold, number_of_folds, too_few_cases
from nnunetv2_macl.messages import for_log_file, heard, show_any_character
from nnunetv2_macl.nnunet import WEIGHTS_VARIABLE, Configuration, checksum
from nnunetv2_macl.planning.plan import (
    MACLPlan,
    check_plan,
    plan_file,
    plan_to_train,
    processes_to_use,
    start_in_short,
    was_handed_on,
    write_plan,
)
from nnunetv2_macl.planning.prepare import prepare
from nnunetv2_macl.preprocessing.cases import Preprocessed, preprocess_unlabelled
from nnunetv2_macl.preprocessing.sources import training_cases
from nnunetv2_macl.recipe import Recipe
from nnunetv2_macl.report import write_report_after_run
from nnunetv2_macl.start import start_from_weights
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.commands import (
    command_as_typed,
    command_to_fine_tune,
    command_to_go_on,
    command_to_pretrain,
)
from nnunetv2_macl.training.compiling import compile_advice, is_compile_error
from nnunetv2_macl.training.epoch_log import CollapseWatch, Epoch, EpochSums, log_keys
from nnunetv2_macl.training.export import export_run
from nnunetv2_macl.training.out_of_memory import is_out_of_memory, out_of_memory_advice
from nnunetv2_macl.training.progress_picture import ProgressPicture
from nnunetv2_macl.training.run_folder import PLAN_COPY, PRETRAINER, RunLock, set_aside, write_cases
from nnunetv2_macl.training.signals import Signals, StoppedWhileWaiting, ignore_in_worker
from nnunetv2_macl.training.step import TrainingStep, learning_rate_share
from nnunetv2_macl.training.user_errors import user_errors_end_the_run

BAD_BATCH = "bad_batch.pth"
# Steps in a row without a finite loss or gradient that end a run; see `TrainingStep.skipped_in_a_row`.
MOST_SKIPPED = 10
# The first steps on a GPU compile the network and choose convolutions, so they say nothing about the speed of the run.
_WARM_UP_STEPS = 3


class nnUNetTrainerMACLPretrain(nnUNetTrainer):
    """Pre-trains encoder and partial decoder on unlabelled images with MACL.

    Everything it needs stands in the MACL plan, which it derives where there is none. The fold decides what is left out:
    ``all`` nothing, F the validation cases of fold F. With ``--c`` the plan is the one that the run began with.
    """

    # The most that a crash may cost, seconds. The end of the first epoch is saved too: it shows that a checkpoint can be written.
    save_every_seconds: float = 300.0
    # nnU-Net's own, which it does not declare
    is_ddp: bool
    current_epoch: int
    grad_scaler: torch.amp.GradScaler | None

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
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            if not is_refused_write(error):
                raise
            told = cannot_write(error, self._where(error))
            raise SystemExit(f"\nError: {told}") from told
        self._take_own_device(device)
        self.num_val_iterations_per_epoch = 0
        self.enable_deep_supervision = False
        self.macl_plan: MACLPlan
        self.recipe: Recipe
        self.data: Preprocessed
        self.sums = EpochSums()
        self.collapse = CollapseWatch()
        self._step = 0
        self._steps_since_start = 0
        self._saved_at = perf_counter()
        self._measured_until: float | None = None
        self._between_epochs: list[float] = []
        # where --c goes on: this epoch while it runs, the next one when it is through
        self._next_epoch = 0
        self._resumed_images: str | None = None
        self._labelled: list[Case] = []
        self._probe_patches: probes.Probe | None = None
        self._signals = Signals()
        self._picture = ProgressPicture(
            Path(self.output_folder) / "progress.png",
            f"MACL pre-training, {self.plans_manager.dataset_name}, {self.configuration_name}, fold {self.fold}",
        )
        self._lock = RunLock(Path(self.output_folder))

    def _take_own_device(self, device: torch.device) -> None:
        """This rank's device. Ranks work together in `TrainingStep`, so nnU-Net shall not wrap the network in DDP."""
        if not self.is_ddp:
            return
        self.is_ddp = False
        self.device = torch.device("cuda", distributed.local_rank()) if device.type == "cuda" else device
        if self.device.type != "cuda":
            self.grad_scaler = None

    # --- set-up ----------------------------------------------------------------------------------------------------------

    @user_errors_end_the_run
    def initialize(self) -> None:
        with self._folder_given_back():
            self._initialize()

    @contextlib.contextmanager
    def _folder_given_back(self) -> Iterator[None]:
        """Where what is in it fails."""
        try:
            yield
        except UserError:
            self._lock.release()
            raise

    def _initialize(self) -> None:
        self.macl_configuration = Configuration(
            self.plans_manager.dataset_name,
            self.plans_manager.plans_name,
            self.configuration_name,
            self.plans_manager,
            self.dataset_json,
        )
        self._refuse_nnunets_pretrained_weights()
        with distributed.first_rank_first() as first:
            if first:
                self._lock.acquire()
                remove_temporary(Path(self.output_folder))
                training_cases(self.macl_configuration)
        self.macl_plan = self._load_plan()
        self.recipe = self.macl_plan.get_recipe()
        self.num_epochs = self.recipe.num_epochs
        self.num_iterations_per_epoch = self.recipe.num_iterations_per_epoch
        self.initial_lr = self.recipe.learning_rate
        self.weight_decay = self.recipe.weight_decay
        torch.manual_seed(self.recipe.seed)
        # nnU-Net's logger takes only keys that it knows, one value an epoch
        probed = probes.probe_keys(len(self.macl_configuration.strides)) if self.recipe.probe_every else []
        self.logger.local_logger.my_fantastic_logging = {key: [] for key in log_keys(self.recipe, probed)}
        super().initialize()
        self.step = TrainingStep(
            self.network, self.optimizer, self.lr_scheduler, self.grad_scaler, self.macl_plan, self.device
        )
        self.logger.update_config({"macl_plan": self.macl_plan.as_json()})

    def _refuse_nnunets_pretrained_weights(self) -> None:
        """Name our command where nnU-Net's was given weights: nnU-Net would look for a whole segmentation network in them."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("-pretrained_weights")
        given = parser.parse_known_args(sys.argv[1:])[0].pretrained_weights
        if given is not None and not was_handed_on():
            raise UserError(
                f"nnU-Net's command cannot start a pre-training from weights. Type:\n"
                f"    {command_to_pretrain(self.macl_configuration, self.fold, self.device.type)} "
                f"-pretrained_weights {shlex.quote(given)}"
            )

    def _load_plan(self) -> MACLPlan:
        """The command's plan. Without a command: of the run that goes on, or beside nnU-Net's, derived where there is none."""
        file = Path(self.output_folder) / PLAN_COPY
        if not (self._continue_training and file.is_file()):
            file = plan_file(self.macl_configuration)
            with distributed.first_rank_first() as first:
                if first and not file.is_file():
                    prepare(self.macl_configuration)
        plan = plan_to_train(file)
        check_plan(plan, self.macl_configuration, file, of_a_run=file.name == PLAN_COPY)
        return plan

    def build_network_architecture(  # type: ignore[override]
        self,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        # without labels there is no first stage's segmentation for the second stage of a cascade
        image_channels = len(self.macl_configuration.channel_names)
        unet = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, image_channels, num_output_channels, enable_deep_supervision
        )
        network = build_model(self.macl_configuration, self.macl_plan.geometry, self.recipe, unet)
        if distributed.world_size() > 1:
            return distributed.synchronise_batch_norm(network, self.device.type)
        return network

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = build_optimizer(self.network, self.recipe)
        return optimizer, LambdaLR(optimizer, partial(learning_rate_share, self.recipe))

    def _build_loss(self) -> None:
        """The methods have their own losses."""

    def _set_batch_size_and_oversample(self) -> None:
        first, last = distributed.share(self.macl_plan.batch_size)
        if self.macl_plan.batch_size < 2 * distributed.world_size():
            raise UserError(
                f"A batch of {self.macl_plan.batch_size} over {distributed.world_size()} GPUs leaves fewer than 2 patches "
                f"each. Type: -batch_size {2 * distributed.world_size()} or more, or a smaller -num_gpus."
            )
        self.batch_size = last - first

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Segmentation layers are no part of pre-training."""

    def plot_network_architecture(self) -> None:
        """nnU-Net's plot draws networks of one input; this one has four."""

    @user_errors_end_the_run
    def run_training(self) -> None:
        try:
            super().run_training()
        except CannotWriteError as error:
            raise self._with_command_to_go_on(error) from error
        except OSError as error:  # of nnU-Net's own files too
            if not is_refused_write(error):
                raise
            raise self._with_command_to_go_on(cannot_write(error, self._where(error))) from error
        except RuntimeError as error:
            if not worker_was_killed(error):
                raise
            hear_no_more_of_workers()
            if "Bus error" in str(error):  # what writing beyond the end of shared memory is called
                raise UserError(f"A data worker was killed. {too_little_shared_memory(self._batch_bytes)}") from error
            raise UserError(
                f"A data worker was killed, most likely for want of memory ({str(error).splitlines()[0]}). Type, with fewer "
                f"workers: nnUNet_n_proc_DA=2 {self._command_to_go_on()}"
            ) from error
        finally:
            if self.dataloader_train is not None:
                self.dataloader_train.close()  # its workers heed no signal
            self._picture.wait()
            self._signals.restore()
            self._lock.release()

    def _with_command_to_go_on(self, error: UserError) -> UserError:
        if not resume.has_checkpoint(Path(self.output_folder)):
            return error
        return UserError(f"{error} To go on then, type:\n    {self._command_to_go_on()}")

    def _where_nnunet_takes_it_from(self) -> str:
        """What our command has options for, nnU-Net's reads from the plan."""
        beside, of_the_run = plan_file(self.macl_configuration), Path(self.output_folder) / PLAN_COPY
        if was_handed_on() or not beside.is_file():
            return ""
        told = (
            f" nnU-Net's command has no such options: set patches_at_once or batch_size in {beside}, and type it again."
        )
        if of_the_run.is_file():
            told += f" To go on (--c), set patches_at_once in {of_the_run}."
        return told

    def _where(self, error: OSError) -> Path:
        """The file that could not be written, or at least its folder: not every such error names it."""
        return Path(error.filename or self.output_folder)

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if self._continue_training and self._resumed_images is None:
            # nnU-Net has found none by the names that it knows
            self._resume()
        data = None
        with distributed.first_rank_first() as first:
            if first:
                if self._resumed_images is None:
                    # the weights may be those of the earlier run in this folder
                    self._start_from_weights()
                    set_aside(Path(self.output_folder), keep=Path(self.log_file), say=self.print_to_log_file)
                data = self._prepare_data()
        # another rank that looked for itself might find other images readable
        self.data = distributed.from_first(data)
        if distributed.rank() == 0:
            super().on_train_start()
            write_plan(self.macl_plan, Path(self.output_folder) / PLAN_COPY)
            if self.macl_plan.recipe_source:
                self.print_to_log_file(f"Recipe: {self.macl_plan.recipe_source}")
            write_cases(Path(self.output_folder), self._cases_by_dataset(), resumed=self._resumed_images is not None)
        else:
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        distributed.spread(self.step.model)
        if self.macl_configuration.is_cascaded:
            self.print_to_log_file(
                f"{self.configuration_name} is the second stage of a cascade: the image channels are pre-trained; the stem's "
                "weights for the first stage's segmentation are freshly initialised when it is fine-tuned"
            )
        self.print_to_log_file(
            f"Pre-training on {len(self.data.cases)} images, {self.num_epochs} epochs of {self.num_iterations_per_epoch} "
            f"steps of {self.macl_plan.batch_size} patches; left out as unreadable: {len(self.data.skipped)}"
        )
        if self._resumed_images not in (None, self._images()):
            self.print_to_log_file(
                "WARNING: the images are no longer those that the run began with; it goes on with these"
            )
        self._signals.listen()

    def _cases_by_dataset(self) -> list[tuple[str, str]]:
        """Return data set and name of each case that the run sees."""
        configuration = self.macl_configuration
        # nnU-Net keeps labelled cases in a folder of the configuration, this package others in a folder of their data set
        datasets = {configuration.cases_folder.name: configuration.dataset_name}
        folders = ((Path(case.file).parent.name, case.name) for case in self.data.cases)
        return [(datasets.get(folder, folder), name) for folder, name in folders]

    def _start_from_weights(self) -> None:
        """Copy in the weights that the plan names. The other ranks get them from this one, with all other weights."""
        start = self.macl_plan.pretrained_weights
        if start is None:
            return
        is_sgd = isinstance(self.optimizer, torch.optim.SGD)
        transfer = start_from_weights(self.step.model, self.macl_configuration, start, rescale=is_sgd)
        lines = [f"The run starts from {start_in_short(start)}", *transfer.table().splitlines()]
        if is_sgd:
            lines.append(
                "For SGD, kernels before an instance norm are scaled to the size of fresh ones: the same function"
            )
        self.print_to_log_file("\n  ".join(lines))

    def _images(self) -> str:
        return checksum([case.name for case in self.data.cases])

    def _prepare_data(self) -> Preprocessed:
        # our command shows on the console itself what preprocessing says
        say = partial(self.print_to_log_file, also_print_to_console=not was_handed_on())
        with heard(say):
            unlabelled = preprocess_unlabelled(
                self.macl_configuration,
                self.macl_plan.unlabelled_datasets,
                processes=processes_to_use(),
                skip_unreadable=self.macl_plan.skip_unreadable,
                channel_map=self.macl_plan.channel_map,
            )
        own = training_cases(self.macl_configuration)
        if self.fold != "all":
            check_fold(self.macl_configuration, int(self.fold))
            left_out = set(self.do_split()[1])
            own = [case for case in own if case.name not in left_out]
            self.print_to_log_file(f"Kept apart: the {len(left_out)} validation images of fold {self.fold}")
        self._labelled = own
        return Preprocessed(own + unlabelled.cases, unlabelled.skipped)

    def get_dataloaders(self) -> tuple[Any, None]:
        return self._batches(), None

    @property
    def _batch_bytes(self) -> int:
        """Size of this rank's share of a batch."""
        return self.macl_plan.batch_bytes(len(self.macl_configuration.channel_names)) // distributed.world_size()

    def _batches(self) -> Iterator[dict]:
        share = distributed.share(self.macl_plan.batch_size)
        batches = PretrainingBatches(
            self.data.cases, self.macl_plan.sampling, share, self.step.steps, draws=self.step.draws
        )
        reading = plan_reading_here(self._batch_bytes, distributed.ranks_on_this_machine())
        stream = load_batches(
            batches,
            self._step,
            workers=reading.workers,
            prefetch=reading.prefetch,
            pin_memory=self.device.type == "cuda",
            prepare_worker=ignore_in_worker,
        )
        try:
            with contextlib.closing(stream):
                while True:
                    with self._signals.waiting():
                        batch = next(stream, None)
                    if batch is None:
                        return
                    yield batch
        except StoppedWhileWaiting:
            if self._step:
                self.save_checkpoint(str(Path(self.output_folder) / resume.LATEST))
            self._stop()
        except (UserError, RuntimeError):
            # between two steps, so what was trained so far is whole
            if self._step:
                self.save_checkpoint(str(Path(self.output_folder) / resume.LATEST))
            raise

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """As nnU-Net's, but every rank says the same, so one is enough."""
        also_print_to_console = also_print_to_console and distributed.rank() == 0
        words = map(for_log_file, args)
        super().print_to_log_file(*words, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)

    # --- one epoch -------------------------------------------------------------------------------------------------------

    def on_epoch_start(self) -> None:
        if not self.sums.steps:
            super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        self.network.train()
        done = self.sums.steps  # of an epoch that was stopped and goes on
        if not done:
            self.logger.log("lrs", self.optimizer.param_groups[0]["lr"], self.current_epoch)
        self.num_iterations_per_epoch = self.recipe.num_iterations_per_epoch - done
        self._next_epoch = self.current_epoch
        now = perf_counter()
        if self._measured_until is not None:
            self._between_epochs.append(now - self._measured_until)
        self._measured_until = now
        self._bar = tqdm(
            total=self.recipe.num_iterations_per_epoch,
            initial=done,
            desc=f"epoch {self.current_epoch}",
            unit="step",
            leave=False,
            disable=not sys.stderr.isatty() or distributed.rank() != 0,
        )

    def train_step(self, batch: dict) -> dict[str, float]:
        try:
            measured = self._train_step(batch)
        except Exception as error:
            if is_compile_error(error):
                typed = command_as_typed(self.macl_configuration, self.fold, self.device.type)
                raise UserError(compile_advice(error, typed)) from error
            if not is_out_of_memory(error):
                raise
            raise UserError(
                out_of_memory_advice(
                    self.macl_plan,
                    self.device.type,
                    not self.disable_checkpointing and resume.has_checkpoint(Path(self.output_folder)),
                    distributed.world_size(),
                    Path(self.output_folder),
                    in_parts=not self.step.model.network.mixes_samples,
                )
                + self._where_nnunet_takes_it_from()
            ) from error
        stop, save = self._signals.asked()
        if stop or save or self._save_is_due():
            self.save_checkpoint(str(Path(self.output_folder) / resume.LATEST))
        if stop:
            self._stop()
        return measured

    def _train_step(self, batch: dict) -> dict[str, float]:
        if self._step == 0:
            self._plot_views(batch)
        is_warm = self.device.type != "cuda" or self._steps_since_start >= _WARM_UP_STEPS
        measured = self.step(batch, self._step)
        if self.step.skipped_in_a_row >= MOST_SKIPPED:
            self._stop_without_gradient(batch, measured)
        self._step += 1
        self._steps_since_start += 1
        now = perf_counter()
        assert self._measured_until is not None
        self.sums.add(measured, skipped=self.step.was_skipped)
        self.sums.add_time(now - self._measured_until, is_warm=is_warm)
        self._measured_until = now
        self._bar.update()
        return measured

    def _save_is_due(self) -> bool:
        return perf_counter() - self._saved_at >= self.save_every_seconds

    def _stop(self) -> None:
        self._bar.close()
        kept = "Nothing was kept: checkpointing is disabled."
        if not self.disable_checkpointing:
            kept = f"To go on, type:\n    {self._command_to_go_on()}"
        self.print_to_log_file(f"Stopped as asked, after {self._step} of {self.step.steps} steps. {kept}")
        raise SystemExit(0)

    def _stop_without_gradient(self, batch: dict, measured: dict[str, float]) -> None:
        self._bar.close()
        rank = distributed.rank()
        file = Path(self.output_folder) / (f"rank{rank}_{BAD_BATCH}" if rank else BAD_BATCH)
        images = {key: batch[key] for key in ("data", "positions", "cases")}
        checkpoints.save({**images, "step": self._step, "measured": measured}, file)
        raise UserError(
            f"{MOST_SKIPPED} steps in a row had no finite loss or gradient (loss {measured['total']:g}), and the run was "
            f"stopped. The last batch is in {file}, for inspection; the checkpoints are of before. Look at the images it "
            f"names, or start anew with a smaller learning_rate (now {self.recipe.learning_rate:g})."
        )

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        self._bar.close()
        # of the whole epoch, of which nnU-Net knows the part since the last start
        epoch = Epoch(self.current_epoch, self.num_epochs, self.macl_plan.batch_size, self.sums, self.recipe)
        log = self.logger.local_logger.my_fantastic_logging
        probed = self._probe()
        for key, value in epoch.log_values(log, probed).items():
            self.logger.log(key, value, self.current_epoch)
        between = sum(self._between_epochs) / len(self._between_epochs) if self._between_epochs else 0.0
        self.print_to_log_file(epoch.line(between))
        if probed:
            self.print_to_log_file(probes.as_words(probed))
        losses = {name: log[f"train_losses/{name}"] for name in self.recipe.losses}
        before = {name: values[-2] for name, values in losses.items() if len(values) > 1}
        reason = monitoring.collapse_reason(
            self.recipe, self.macl_plan.batch_size, self.sums.means(), before, self._step
        )
        if told := self.collapse.see(reason, self.recipe):
            self.print_to_log_file(told)

    def _probe(self) -> dict[str, float]:
        """What the features are worth, in the epochs that the recipe asks for, and in the last."""
        every, number = self.recipe.probe_every, self.current_epoch + 1
        if distributed.rank() != 0 or not every or (number % every and number < self.num_epochs):
            return {}
        if self._probe_patches is None:
            self._probe_patches = probes.Probe(
                self.macl_configuration,
                self._labelled,
                PretrainingBatches(
                    self.data.cases,
                    self.macl_plan.sampling,
                    distributed.share(self.macl_plan.batch_size),
                    self.step.steps,
                ),
                self.macl_plan.patch_size,
                self.recipe.seed,
            )
        return self._probe_patches.measure(self.step)

    def on_validation_epoch_start(self) -> None:
        """There are no labels to validate on."""

    def on_validation_epoch_end(self, val_outputs: list) -> None:
        """There are no labels to validate on."""

    def on_epoch_end(self) -> None:
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        self.sums, self._next_epoch = EpochSums(), self.current_epoch + 1
        last = self._next_epoch == self.num_epochs
        if not last and (self._next_epoch == 1 or self._save_is_due()):
            self.save_checkpoint(str(Path(self.output_folder) / resume.LATEST))
        if distributed.rank() == 0:
            self._picture.update(self.logger.local_logger.my_fantastic_logging, is_last=last)
        # rank 0 has probed, saved and drawn meanwhile
        distributed.wait_for_all()
        self.current_epoch += 1
        patience = self.recipe.collapse_patience
        if patience and self.collapse.reason and self.collapse.epochs >= patience and not last:
            latest = Path(self.output_folder) / resume.LATEST
            self.save_checkpoint(str(latest))
            raise UserError(
                f"The run sat in collapse for {self.collapse.epochs} epochs and was stopped: {self.collapse.reason}. "
                f"{monitoring.collapse_advice(self.recipe)}"
                + (
                    f" To go on all the same, set collapse_patience to 0 in {latest.with_name(PLAN_COPY)} and type:\n"
                    f"    {self._command_to_go_on()}"
                    if latest.is_file()
                    else ""
                )
            )

    def on_train_end(self) -> None:
        super().on_train_end()
        if distributed.rank() == 0 and not self.disable_checkpointing:
            log = self.logger.local_logger.my_fantastic_logging
            export_run(
                Path(self.output_folder),
                self.macl_configuration,
                self.macl_plan,
                self.step.model,
                {
                    "fold": str(self.fold),
                    "epochs": self.num_epochs,
                    "images": len(self.data.cases),
                    "final_losses": {key: log[key][-1] for key in log if key.startswith("train_losses")},
                    "collapsed": self.collapse.reason,
                },
            )
            resume.remove_previous(Path(self.output_folder))
            write_report_after_run(Path(self.output_folder), self.print_to_log_file, self.device.type)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing to validate; what comes next is fine-tuning, and this is the command for it."""
        if self.disable_checkpointing:
            self.print_to_log_file("No weights were written: checkpointing is disabled.")
            return
        is_own = type(self).__name__ != PRETRAINER
        collapsed = (
            "The run ended COLLAPSED: fine-tuning from it is not likely to help.\n" if self.collapse.reason else ""
        )
        no_folds = ""
        with contextlib.suppress(UserError, KeyError):  # a splits file that cannot be read is a matter of fine-tuning
            if not number_of_folds(self.macl_configuration):
                no_folds = f"{too_few_cases(self.macl_configuration)}\n"
        self.print_to_log_file(
            f"{collapsed}Weights: {self.output_folder}\n{no_folds}Fine-tune from them:\n"
            f'    export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"\n    '
            # fine-tuning looks in the folder of this package's own trainer
            + (f"export {WEIGHTS_VARIABLE}={shlex.quote(str(self.output_folder))}\n    " if is_own else "")
            + command_to_fine_tune(self.macl_configuration, self.fold, self.device.type)
        )

    def _command_to_go_on(self) -> str:
        return command_to_go_on(self.macl_configuration, self.fold, self.device.type, type(self).__name__)

    # --- files -----------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Everything needed to go on, written whole or not at all; loads with ``weights_only=True``."""
        self._saved_at = perf_counter()
        if distributed.rank() != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        file = Path(filename)
        if file.name == resume.LATEST:
            resume.keep_previous(file)
        checkpoints.save(
            {
                "format_version": resume.FORMAT_VERSION,
                "kind": resume.KIND,
                "run": self._run,
                "network_weights": self.step.model.state_dict(),
                "optimizer_state": self.optimizer.state_dict(),
                "lr_scheduler_state": {"last_epoch": self._step},
                "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
                "logging": self.logger.get_checkpoint(),
                "current_epoch": self._next_epoch,
                # no state of a random generator: batches, views and dropout are functions of (seed, step)
                "step": self._step,
                "epoch_sums": self.sums.as_dict(),
                "collapse": asdict(self.collapse),
                "collapsed": self.collapse.reason,
                "images": self._images(),
                "trainer_name": self.__class__.__name__,
            },
            file,
        )

    @property
    def _run(self) -> dict[str, Any]:
        """What tells this run's checkpoints from another's."""
        # what may change within a run: in how many parts a batch is computed, what is done about an image that went bad and
        # about a collapse; and how the recipe was asked for, which earlier versions did not record
        plan = replace(
            self.macl_plan,
            patches_at_once=self.macl_plan.batch_size,
            skip_unreadable=False,
            recipe=self.macl_plan.recipe | {"collapse_patience": 0},
            recipe_name=None,
            settings=None,
        )
        return {"fold": str(self.fold), "macl_plan": plan.as_json()}

    @user_errors_end_the_run
    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Go on with the run: from the checkpoint given, or from the newest good one in the folder of the file given."""
        if not self.was_initialized:
            self.initialize()
        with self._folder_given_back():
            if isinstance(filename_or_checkpoint, dict):
                self._restore(filename_or_checkpoint)
            else:
                self._resume()

    def _resume(self) -> None:
        arguments = (Path(self.output_folder), self._run, self.print_to_log_file)
        with distributed.first_rank_first() as first:
            checkpoint = resume.load_checkpoint(*arguments) if first else None
        if distributed.rank() != 0:
            checkpoint = resume.load_checkpoint(*arguments)
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.step.model.load_state_dict(resume.weights_of(checkpoint))
        load_optimizer(self.optimizer, checkpoint["optimizer_state"])
        self._step = self.lr_scheduler.last_epoch = checkpoint["step"]
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        self.current_epoch = self._next_epoch = checkpoint["current_epoch"]
        self.sums = EpochSums(**checkpoint["epoch_sums"])
        self.collapse = CollapseWatch(**checkpoint["collapse"])
        self._resumed_images = checkpoint["images"]

    # --- helpers ---------------------------------------------------------------------------------------------------------

    def _plot_views(self, batch: dict) -> None:
        if distributed.rank() != 0:
            return
        views = self.step.show(batch["data"], self._step)
        shown = {
            title: views[method.name][name]
            for method in self.step.methods
            for name, title in method.view_titles.items()
            if name in views[method.name]
        }
        # a picture is no reason to end a run
        with contextlib.suppress(UserError):
            monitoring.plot_views(
                shown,
                batch["positions"],
                batch["cases"],
                self.macl_plan.threshold if self.recipe.compares_positions else None,
                Path(self.output_folder) / "views.png",
            )
