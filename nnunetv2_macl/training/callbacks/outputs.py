"""Callbacks that write the results of a run: pictures, weights, the report, and the next command."""

from __future__ import annotations

import contextlib
import shlex
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from nnunetv2_macl import checkpoints, distributed, monitoring
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.factory import build_segmentation_network
from nnunetv2_macl.folds import number_of_folds, too_few_cases
from nnunetv2_macl.methods.registry import citations_of, methods_of
from nnunetv2_macl.nnunet import WEIGHTS_VARIABLE, read_json
from nnunetv2_macl.report import write_report_after_run
from nnunetv2_macl.training import resume
from nnunetv2_macl.training.callbacks.base import Callback
from nnunetv2_macl.training.commands import FINETUNER, SHORT_FINETUNER, command_to_fine_tune
from nnunetv2_macl.training.epoch_log import CURVES_FILE, write_curves
from nnunetv2_macl.training.run_folder import PRETRAINER, digests_of

if TYPE_CHECKING:
    from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain


class Pictures(Callback):
    """Writes ``epochs.csv`` and ``progress.png`` after each epoch, and ``views.png`` before the first step."""

    def __init__(self, trainer: nnUNetTrainerMACLPretrain) -> None:
        super().__init__(trainer)
        dataset, configuration = trainer.plans_manager.dataset_name, trainer.configuration_name
        title = f"MACL pre-training, {dataset}, {configuration}, fold {trainer.fold}"
        self._title, self._draw_again = title, 0.0

    def on_step_start(self, batch: dict[str, Any]) -> None:
        if self.trainer.steps_done or distributed.rank() != 0:
            return
        step, recipe = self.trainer.step, self.trainer.recipe
        views = step.show(batch["data"], 0)
        shown = {
            title: views[method.name][name]
            for method in step.methods
            for name, title in method.view_titles.items()
            if name in views[method.name]
        }
        # A picture that cannot be written does not end the run.
        with contextlib.suppress(UserError):
            monitoring.plot_views(
                shown,
                batch["positions"],
                batch["cases"],
                self.trainer.macl_plan.threshold if recipe.compares_positions else None,
                self.folder / "views.png",
            )

    def on_epoch_end(self, *, is_last: bool) -> None:
        if distributed.rank() != 0:
            return
        log, began = self.trainer.log_of_epochs, perf_counter()
        # A table or a picture that cannot be written does not end the run.
        with contextlib.suppress(UserError):
            write_curves({key: values for key, values in log.items() if values}, self.folder / CURVES_FILE)
        if is_last or began >= self._draw_again:
            with contextlib.suppress(UserError):
                monitoring.plot_progress(log, self.folder / "progress.png", self._title)
            # at most once a minute, and in at most about a hundredth of the time
            self._draw_again = max(began + 60, began + 100 * (perf_counter() - began))


class Export(Callback):
    """Writes the weights for fine-tuning and the report, and prints the command that fine-tunes."""

    def on_train_end(self) -> None:
        trainer = self.trainer
        if distributed.rank() != 0 or trainer.disable_checkpointing:
            return
        plan, target, model = trainer.macl_plan, trainer.macl_configuration, trainer.step.model
        encoder, decoder = model.network.trained_weights()
        torch.manual_seed(plan.get_recipe().seed)
        fresh = build_segmentation_network(target)
        inputs = determine_num_input_channels(target.plans_manager, target.manager, target.dataset_json)
        started_from = (plan.pretrained_weights or {}).get("citations", ())
        description = {
            "architecture": target.architecture(),
            "network_input_channels": inputs,
            "preprocessing": target.preprocessing(),
            "dataset_name": target.dataset_name,
            "plans_name": target.plans_name,
            "configuration": target.name,
            "fold": str(trainer.fold),
            "left_out": sorted(digests_of(trainer.do_split()[1])) if trainer.fold != "all" else [],
            "dataset_fingerprint": {
                "images": len(trainer.data.cases),
                "unlabelled_datasets": plan.unlabelled_datasets,
                "channel_names": target.channel_names,
                "nnunet": read_json(target.folder / "dataset_fingerprint.json", ""),
            },
            "macl_plan": plan.as_json(),
            "recipe": plan.recipe,
            "epochs": trainer.num_epochs,
            "final_losses": {k: v[-1] for k, v in trainer.log_of_epochs.items() if k.startswith("train_losses")},
            "collapsed": trainer.collapse.watch.reason,
            "citations": list(dict.fromkeys([*citations_of(methods_of(plan.get_recipe().method)), *started_from])),
        }
        checkpoints.export_weights(
            self.folder, encoder=encoder, decoder=decoder, unet_weights=fresh.state_dict(), description=description
        )
        with contextlib.suppress(OSError):
            (self.folder / resume.PREVIOUS).unlink(missing_ok=True)
        write_report_after_run(self.folder, trainer.print_to_log_file, trainer.device.type)

    def tell_next_command(self) -> None:
        """Print where the weights are, and the command that fine-tunes from them."""
        trainer = self.trainer
        if trainer.disable_checkpointing:
            trainer.print_to_log_file("No weights were written: checkpointing is disabled.")
            return
        collapsed = no_folds = folder = ""
        if trainer.collapse.watch.reason:
            collapsed = "The run ended COLLAPSED, so fine-tuning from its weights is unlikely to help.\n"
            if len(trainer.step.methods) > 1:
                collapsed = "The contrast ended COLLAPSED, so only restoration has trained the network.\n"
        # Pre-training does not need the splits file, so only fine-tuning reports a file that cannot be read.
        with contextlib.suppress(UserError, KeyError):
            if not number_of_folds(trainer.macl_configuration):
                no_folds = f"{too_few_cases(trainer.macl_configuration)}\n"
        # Fine-tuning looks only in the folder of this package's own trainer.
        if type(trainer).__name__ != PRETRAINER:
            folder = f"export {WEIGHTS_VARIABLE}={shlex.quote(str(trainer.output_folder))}\n    "
        short, full = (
            command_to_fine_tune(trainer.macl_configuration, trainer.fold, trainer.device.type, name)
            for name in (SHORT_FINETUNER, FINETUNER)
        )
        trainer.print_to_log_file(
            f"{collapsed}Weights: {trainer.output_folder}\n{no_folds}"
            "Fine-tune from them, for 800 steps or for nnU-Net's 1000 epochs:\n"
            f'    export nnUNet_extTrainer="$(nnUNetv2_macl_trainers)"\n    {folder}{short}\n    {full}'
        )
