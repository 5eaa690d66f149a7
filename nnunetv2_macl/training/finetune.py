"""Fine-tuning: nnU-Net's own training, which starts from pre-trained weights."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler, PolyLRScheduler_offset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule

from nnunetv2_macl import __version__, checkpoints, formats
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.folds import check_fold, number_of_folds, too_few_cases
from nnunetv2_macl.main_guard import require_main_guard
from nnunetv2_macl.messages import for_log_file, show_any_character
from nnunetv2_macl.nnunet import WEIGHTS_VARIABLE, DatasetConfiguration
from nnunetv2_macl.patients import patients_by_variable
from nnunetv2_macl.text import first_of, pluralise
from nnunetv2_macl.training.commands import command_to_fine_tune, command_to_go_on, command_to_pretrain
from nnunetv2_macl.training.initial_weights import transfer_to
from nnunetv2_macl.training.resume import has_checkpoint
from nnunetv2_macl.training.run_folder import cases_seen, folders_to_start_from, not_left_out
from nnunetv2_macl.training.user_errors import exit_on_user_error
from nnunetv2_macl.transfer import Transfer, kernel_norms, rescale_kernels

logger = logging.getLogger(__name__)

# beginning of the message that nnU-Net's -pretrained_weights was used, or that code has called `initialize`
GIVEN_WEIGHTS = "The network was initialised before the training"


class nnUNetTrainerMACL(nnUNetTrainer):
    """Fine-tunes from MACL weights. Loss and augmentation are nnU-Net's, and by default optimiser and schedule too.

    The weights are those of the data set's own pre-training: ``fold_F`` if it exists, else ``fold_all``. The variable
    ``nnUNet_macl_weights`` names another folder or file, and nnU-Net's ``-pretrained_weights`` takes precedence over both.
    The checkpoints are ordinary nnU-Net checkpoints, so prediction does not need this package, unless the plan names one of its
    networks.
    """

    finetuning_epochs: int = 1000
    # training steps per epoch; validation has a fifth as many
    finetuning_iterations: int = 250
    # None: 1e-2 for sgd, as in nnU-Net, and 3e-3 for adamw
    finetuning_lr: float | None = None
    # sgd as in nnU-Net, or adamw, which is better in a short training
    finetuning_optimizer: str = "sgd"
    # number of epochs in which the learning rate rises linearly, before nnU-Net's schedule
    warmup_epochs: int = 0
    # whether to start from nnU-Net's random weights instead of pre-trained ones
    from_scratch: bool = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, which it inspects
    ) -> None:
        show_any_character()
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.finetuning_epochs
        self.num_iterations_per_epoch = self.finetuning_iterations
        self.num_val_iterations_per_epoch = max(1, self.finetuning_iterations // 5)
        self.initial_lr = self.finetuning_lr or (3e-3 if self.finetuning_optimizer == "adamw" else 1e-2)
        # what a checkpoint says about the trainer and the weights that it started from
        self.macl_origin: dict[str, Any] = {"trainer": type(self).__name__, "nnunetv2_macl": __version__}
        self._continues = False
        self._split: tuple[list[str], list[str]] | None = None

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Print like nnU-Net, and escape characters that the log file cannot hold."""
        words = map(for_log_file, args)
        super().print_to_log_file(*words, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer, scheduler = super().configure_optimizers()
        if self.finetuning_optimizer not in ("sgd", "adamw"):
            raise UserError(
                f"{type(self).__name__}.finetuning_optimizer is {self.finetuning_optimizer!r}. Set it to 'sgd' or 'adamw'."
            )
        if self.finetuning_optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
            scheduler = PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)
        # At least one epoch must follow the warm-up, because nnU-Net's schedule divides by the number of these epochs.
        warmup = min(self.warmup_epochs, self.num_epochs - 1)
        if warmup > 0:
            scheduler = _WarmupPolyLR(optimizer, self.initial_lr, warmup, self.num_epochs)
        return optimizer, scheduler

    # The decorated methods are those that nnU-Net's command calls.
    @exit_on_user_error
    def initialize(self) -> None:
        super().initialize()

    @exit_on_user_error
    def run_training(self) -> None:
        # nnU-Net's validation starts processes, which import a script again.
        require_main_guard()
        super().run_training()

    @exit_on_user_error
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        super().perform_actual_validation(save_probabilities)

    def on_train_start(self) -> None:
        if not self.was_initialized and not self.from_scratch:
            pretrained = self._find_weights()
            self.initialize()
            self.load_macl_weights(pretrained)
        elif not self._continues and not self.from_scratch:
            # nnU-Net's -pretrained_weights, or code that has called `initialize`
            self.print_to_log_file(
                f"{GIVEN_WEIGHTS}, for example by -pretrained_weights. It keeps its weights, and no others are loaded."
            )
        super().on_train_start()

    def _find_weights(self) -> checkpoints.PretrainedWeights:
        if named := os.environ.get(WEIGHTS_VARIABLE):
            return formats.load_weights(Path(named).expanduser())
        plans, configuration = self.plans_manager.plans_name, self.configuration_name
        runs = folders_to_start_from(Path(str(nnUNet_results)), self._configuration)
        unfinished: list[Path] = []
        for folder in runs:
            for fold in dict.fromkeys((f"fold_{self.fold}", "fold_all")):
                if (folder / fold / checkpoints.ENCODER_FILE).is_file():
                    return checkpoints.load_weights(folder / fold)
                if has_checkpoint(folder / fold):
                    unfinished.append(folder / fold)
                    self.print_to_log_file(
                        f"The pre-training in {folder / fold} is not finished, so it holds no weights yet."
                    )
        if unfinished:
            fold = unfinished[0].name.removeprefix("fold_")
            raise UserError(
                f"The pre-training in {unfinished[0]} is not finished, so it holds no weights yet. Continue it:\n"
                f"    {command_to_go_on(self._configuration, fold, self.device.type)}\n"
                f"or name other weights: export {WEIGHTS_VARIABLE}=/path/to/folder_or_file"
            )
        earlier = sorted(
            runs[0].glob(f"fold_*/previous_*/{checkpoints.ENCODER_FILE}"), key=lambda file: file.stat().st_mtime
        )
        weights = shlex.quote(str(earlier[-1].parent)) if earlier else "/path/to/folder_or_file"
        searched = "no fold_all" if self.fold == "all" else f"neither fold_{self.fold} nor fold_all"
        raise UserError(
            f"No pre-trained weights for {self.plans_manager.dataset_name}, {plans}, {configuration}: {searched} in {runs[0]} "
            f"holds {checkpoints.ENCODER_FILE}. Type:\n"
            f"    {command_to_pretrain(self._configuration, self.fold, self.device.type)}\n"
            f"or name weights: export {WEIGHTS_VARIABLE}={weights}"
        )

    def load_macl_weights(self, pretrained: checkpoints.PretrainedWeights) -> None:
        """Copy the pre-trained weights into the network, scale them to initial norms for SGD, and log which weights were loaded.

        Raises:
            UserError: The network of the weights differs too much. The message names the first difference.
        """
        module = self.bare_network
        state = module.state_dict()
        transfer = transfer_to(self._configuration, state, pretrained)
        fresh = kernel_norms(module)
        module.load_state_dict({**state, **transfer.weights})
        # Relative to a kernel, a step of SGD shrinks with the square of the norm. AdamW did not benefit from scaled kernels.
        rescaled = bool(fresh) and isinstance(self.optimizer, torch.optim.SGD)
        if rescaled:
            rescale_kernels(module, fresh)
        self._report(pretrained, transfer, rescaled)
        self.macl_origin |= {
            "weights": [file.name for file in pretrained.files],
            "recipe": pretrained.description.get("recipe"),
            "pretrained_epochs": pretrained.description.get("epochs"),
            "citations": pretrained.description.get("citations", []),
        }

    @property
    def bare_network(self) -> nn.Module:
        """Return the network without the wrappers of torch.compile and of distributed training."""
        module = self.network.module if self.is_ddp else self.network
        return module._orig_mod if isinstance(module, OptimizedModule) else module

    @property
    def _configuration(self) -> DatasetConfiguration:
        return DatasetConfiguration.from_plans(self.plans_manager, self.configuration_name, self.dataset_json)

    def _report(self, pretrained: checkpoints.PretrainedWeights, transfer: Transfer, rescaled: bool) -> None:
        # This call is the first, because nnU-Net logs its split in it. The report reads the lines below as one block.
        seen = None if self.fold == "all" else self._seen_before(pretrained)
        lines = [f"{pretrained.origin} weights from {', '.join(str(file) for file in pretrained.files)}"]
        for part in ("encoder", "decoder"):
            loaded, tensors = transfer.count(part)
            lines.append(f"  {part}: {loaded} of {tensors} tensors loaded")
        if rescaled:
            lines.append(
                "  for SGD, kernels before an instance norm are scaled to their initial norms, and the output stays the same"
            )
        self.print_to_log_file("\n".join(lines))
        if transfer.difference:
            lines = [f"  The weights are from another network: {transfer.difference}", *transfer.table().splitlines()]
        else:
            lines = [f"{row.how}: {row.part} ({row.why})" for row in transfer.rows if row.why]
        self.print_to_log_file("\n  ".join(["", *lines])[1:], add_timestamp=False)
        if seen:
            self.print_to_log_file(f"  WARNING: {seen}", add_timestamp=False)
        description = pretrained.description
        if description.get("collapsed"):
            self.print_to_log_file(f"WARNING: these weights are from a run that collapsed: {description['collapsed']}")
        start = (description.get("macl_plan") or {}).get("pretrained_weights")
        while start:
            seen_by_start = str(start.get("fold")) != str(self.fold)
            if self.fold != "all" and (cases := not_left_out(self.do_split()[1], start)) is not None:
                seen_by_start = bool(cases)
            if start.get("dataset_name") == self.plans_manager.dataset_name and self.fold != "all" and seen_by_start:
                labels = (
                    " with their labels, and their Dice will then be too high"
                    if start.get("origin") == "nnU-Net"
                    else ""
                )
                self.print_to_log_file(
                    f"WARNING: the pre-training started from {start.get('origin')} weights that were trained on "
                    f"{start['dataset_name']}, fold {start.get('fold')}. That training may have seen this fold's validation "
                    f"cases{labels}."
                )
            start = start.get("started_from")

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return nnU-Net's split, cached so that nnU-Net logs it only once.

        Raises:
            UserError: nnU-Net cannot make this fold.
        """
        if self._split is None:
            if self.fold != "all" and not number_of_folds(self._configuration):
                command = command_to_fine_tune(self._configuration, "all", self.device.type, type(self).__name__)
                raise UserError(f"{too_few_cases(self._configuration)}\nTo train on all cases, type:\n    {command}")
            if self.fold != "all":
                check_fold(self._configuration, int(self.fold))
            self._split = super().do_split()
        return self._split

    def _seen_before(self, pretrained: checkpoints.PretrainedWeights) -> str | None:
        """Return a warning if pre-training has seen validation cases of this fold, else None."""
        description, own = pretrained.description, self.plans_manager.dataset_name
        is_own = description.get("dataset_name") == own
        other_fold = is_own and str(description.get("fold")) != str(self.fold)
        if pretrained.kind == "nnunet":
            return (
                f"These weights were trained with the labels of {own}, fold {description.get('fold')}. If both "
                "trainings use the same folds, the validation cases of this fold were training cases there, and their Dice "
                f"will be too high. Use a checkpoint of fold {self.fold}."
            ) if other_fold else None  # fmt: skip
        leave_out = f"To leave them out: {command_to_pretrain(self._configuration, self.fold, self.device.type)}"
        seen = cases_seen(pretrained.files[0].parent)
        if seen is None:  # weights without their run's folder
            held_out = self.do_split()[1]
            if is_own and (names := not_left_out(held_out, description)) is not None:
                return (
                    f"Pre-training did not leave out {len(names)} of this fold's {len(held_out)} validation cases, so their "
                    f"images may have been among the pre-training images, without their labels: {first_of(names)}. {leave_out}"
                ) if names else None  # fmt: skip
            others = (description.get("dataset_fingerprint") or {}).get("unlabelled_datasets") or ()
            if not (other_fold or own in others):
                return None
            return (
                "The images of this fold's validation cases were among the pre-training images, without their labels. "
                f"{leave_out}"
            )
        validation = set(self.do_split()[1])
        if names := sorted(seen.get(own, set()) & validation):
            return (
                f"{len(names)} of this fold's {len(validation)} validation cases were among the pre-training images, without "
                f"their labels: {first_of(names)}. {leave_out}"
            )
        images = set().union(*seen.values())
        try:
            patients = patients_by_variable(sorted(images | validation)) or {}
        except UserError as error:
            # The names of another data set may follow another rule, and the training is possible.
            return f"It is not known whether pre-training has seen other images of this fold's validation patients: {error}"
        theirs = {patients[name] for name in validation if patients}
        if names := sorted(name for name in images if patients.get(name) in theirs):
            return (
                f"The pre-training images include {pluralise(len(names), 'image')} of this fold's validation patients, without "
                f"labels: {first_of(names)}. {leave_out}"
            )
        return None

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint completely or not at all, with the name of nnU-Net's own trainer.

        nnU-Net can then predict without this package, unless the plan names one of its networks. The key ``macl`` names the
        actual trainer. A subclass that builds a network of its own keeps its name.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with _instead_of_torch_save() as saved:
            super().save_checkpoint(filename)
        checkpoint = saved[0]
        if type(self).build_network_architecture is nnUNetTrainer.build_network_architecture:
            checkpoint["trainer_name"] = nnUNetTrainer.__name__
        checkpoints.save(checkpoint | self.checkpoint_content(), Path(filename))

    def checkpoint_content(self) -> dict[str, Any]:
        """Return the content of a checkpoint that nnU-Net's own checkpoints lack."""
        return {"macl": self.macl_origin}

    @exit_on_user_error
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self._continues = True
        # nnU-Net loads to the GPU. Adam would wait for the GPU to read each counter of steps there.
        for values in self.optimizer.state.values():
            if "step" in values:
                values["step"] = values["step"].cpu()
        self.load_checkpoint_content(torch.load(filename_or_checkpoint, map_location="cpu", weights_only=False))

    def load_checkpoint_content(self, checkpoint: dict[str, Any]) -> None:
        """Read the content that `checkpoint_content` returned. Checkpoints of other trainers do not have it."""
        self.macl_origin = checkpoint.get("macl") or self.macl_origin


class ShortFineTuning:
    """The length and the optimiser of the short training in the documentation: 800 steps of AdamW."""

    finetuning_epochs = 8
    finetuning_iterations = 100
    finetuning_optimizer = "adamw"
    finetuning_lr = 3e-3


def shorter_variants(trainer: type[nnUNetTrainerMACL]) -> dict[str, Any]:
    """Return the variants of a trainer with fewer epochs, by the names that nnU-Net gives to its own variants."""
    names = {f"{trainer.__name__}_{n}epoch{'s' * (n > 1)}": n for n in (1, 5, 10, 20, 50, 100, 250, 500)}
    return {name: type(name, (trainer,), {"finetuning_epochs": epochs}) for name, epochs in names.items()}


@contextmanager
def _instead_of_torch_save() -> Iterator[list[dict]]:
    """Within the context, collect saved objects in a list, because nnU-Net returns its checkpoint in no other way."""
    saved: list[dict] = []
    original = torch.save
    torch.save = lambda content, *_, **__: saved.append(content)
    try:
        yield saved
    finally:
        torch.save = original


class _WarmupPolyLR:
    """nnU-Net's linear warm-up followed by its poly schedule, stepped once per epoch."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float, warmup: int, epochs: int) -> None:
        self.warmup = warmup
        self.increase = Lin_incr_LRScheduler(optimizer, lr, warmup)
        self.poly = PolyLRScheduler_offset(optimizer, lr, epochs, warmup)

    def step(self, epoch: int) -> None:
        (self.increase if epoch < self.warmup else self.poly).step(epoch)
