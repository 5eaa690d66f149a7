"""Measure three training steps, in another process and a temporary folder.

``python -m nnunetv2_macl.doctor.measure DATASET CONFIGURATION PLANS DEVICE`` prints one line of JSON last.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from time import perf_counter
from typing import Any

import psutil
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_macl.data import PretrainingBatches, load_batches, plan_reading_here
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.derive import DEFAULT_RECIPE, derive_plan
from nnunetv2_macl.planning.plan import MACLPlan, check_plan, plan_file, read_plan, was_edited
from nnunetv2_macl.preprocessing.cases import Preprocessed
from nnunetv2_macl.preprocessing.sources import training_cases
from nnunetv2_macl.recipe import load_recipe
from nnunetv2_macl.training.callbacks.measuring import MAX_SKIPPED_STEPS
from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain

STEPS = 3
# Mixed precision may skip steps until its scale has come down from 2^16 to 1, and MAX_SKIPPED_STEPS more end a run.
_MOST_STEPS = 16 + MAX_SKIPPED_STEPS + 1 + STEPS


def plan_in_use(configuration: DatasetConfiguration) -> tuple[MACLPlan, str]:
    """Return the MACL plan that repeating the last command would use, and its origin. Write nothing."""
    file = plan_file(configuration)
    if not file.is_file():
        return derive_plan(configuration, load_recipe(DEFAULT_RECIPE, resource_folder("plans"))), "to be derived"
    plan = read_plan(file)
    if was_edited(file):
        origin = "as edited"
    elif plan.nnunet_plan_checksum == configuration.plan_checksum():
        origin = "as in the last run"
    else:
        images = {key: getattr(plan, key) for key in ("unlabelled_datasets", "skip_unreadable", "channel_map")}
        derived = derive_plan(configuration, plan.get_recipe())
        return replace(derived, **images), "to be derived anew, because nnU-Net's plan has changed"
    check_plan(plan, configuration, file)
    return plan, origin


class _Measured(nnUNetTrainerMACLPretrain):
    """Trains as pre-training does, on the training images, which are preprocessed already. Writes no files."""

    def _load_plan(self) -> MACLPlan:
        # the weights that a run starts from change neither its speed nor its memory
        return replace(plan_in_use(self.macl_configuration)[0], pretrained_weights=None)

    def _prepare_data(self) -> Preprocessed:
        return Preprocessed(training_cases(self.macl_configuration), {})

    def get_dataloaders(self) -> tuple[Any, None]:
        # The plan may have fewer steps than the measurement.
        plan = self.macl_plan
        batches = PretrainingBatches(
            self.data.cases, plan.sampling, (0, plan.batch_size), _MOST_STEPS, draws=self.step.draws
        )
        reading = plan_reading_here(self.batch_bytes)
        pinned = self.device.type == "cuda"
        stream = load_batches(batches, 0, workers=reading.workers, prefetch=reading.prefetch, pin_memory=pinned)
        return stream, None


def measure(dataset: str, configuration: str, plans: str, device: str) -> dict[str, Any]:
    """Return seconds per step, memory, and disk space of a run, in GiB, measured over `STEPS` steps after a warm-up."""
    target = DatasetConfiguration.load(dataset, plans, configuration)
    plans_content = target.plans_manager.plans | {"continue_training": False}
    trainer = _Measured(plans_content, target.name, "all", target.dataset_json, torch.device(device))
    trainer.disable_checkpointing = True
    torch.backends.cudnn.benchmark = device == "cuda"  # as nnU-Net's training command
    trainer.print_to_log_file = lambda *_, **__: None  # type: ignore[method-assign]
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batches = trainer.dataloader_train
    trainer.train_step(next(batches))
    # Mixed precision may skip the first steps. The optimiser allocates its state in the first step that is not skipped.
    while trainer.step.was_skipped:
        trainer.train_step(next(batches))
    began = perf_counter()
    for _ in range(STEPS):
        trainer.train_step(next(batches))
    seconds = (perf_counter() - began) / STEPS
    batches.close()
    # Measure reading on its own, because batches that were read ahead hide its time.
    plan = trainer.macl_plan
    began = perf_counter()
    PretrainingBatches(trainer.data.cases, plan.sampling, (0, plan.batch_size), _MOST_STEPS + 1)[_MOST_STEPS]
    reading = (perf_counter() - began) / max(1, get_allowed_n_proc_DA())
    recipe = plan.get_recipe()
    states = {"sgd": 1, "adam": 2, "adamw": 2}[recipe.optimizer]
    parameters = sum(p.numel() for p in trainer.network.parameters())
    return {
        "seconds_per_step": max(seconds, reading),
        "epochs": recipe.num_epochs,
        "steps_per_epoch": recipe.num_iterations_per_epoch,
        "batch_size": plan.batch_size,
        "patch_size": plan.patch_size,
        "memory_gib": _memory(device) / 2**30,
        # the latest and the final checkpoint, and three files of weights
        "run_gib": 4 * parameters * (2 * (1 + states) + 3) / 2**30,
    }


def _memory(device: str) -> float:
    """Return the peak memory of this process in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    try:
        measured = measure(*sys.argv[1:5])
    except (Exception, SystemExit) as error:
        # A trainer turns user errors into SystemExit.
        by_user = isinstance(error, (UserError, SystemExit))
        measured = {"error": str(error) if by_user else f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(measured), flush=True)
