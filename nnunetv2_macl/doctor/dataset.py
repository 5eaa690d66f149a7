"""Checks of one data set: plans, folds, images, time and space of a run, and weights to fine-tune from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from nnunetv2_macl import checkpoints
from nnunetv2_macl.data import plan_reading_here
from nnunetv2_macl.doctor import machine
from nnunetv2_macl.doctor.result import NOTE, OK, PROBLEM, Result, ask
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.folds import check_fold, number_of_folds, splits_file, too_few_cases
from nnunetv2_macl.nnunet import WEIGHTS_VARIABLE, DatasetConfiguration, raw_folder
from nnunetv2_macl.planning.plan import MACLPlan
from nnunetv2_macl.preprocessing.cases import (
    bytes_on_disk,
    index_of,
    made_of,
    preprocess_case,
    sources_in_use,
)
from nnunetv2_macl.preprocessing.reading import SingleSliceError, UnusableImageError
from nnunetv2_macl.preprocessing.sources import (
    UNLABELLED_FOLDER,
    CaseFiles,
    Source,
    spacing_warning,
    training_cases,
)
from nnunetv2_macl.text import pluralise, size_text
from nnunetv2_macl.training.commands import command_to_fine_tune, command_to_pretrain
from nnunetv2_macl.training.initial_weights import load_transfer
from nnunetv2_macl.training.run_folder import folders_to_start_from

_MEASURE_TIMEOUT = 600
# Time for reading the images that a run would read.
_READ_SECONDS = 30.0
# Number of images that a message names.
_SHOWN = 3


def dataset_checks(
    dataset: str, configuration: str | None, plans: str, device: str, timeout: float = _MEASURE_TIMEOUT
) -> Iterator[Result]:
    """Yield the results for a data set. The measurement of a run may take ``timeout`` seconds."""
    from nnunetv2_macl.doctor.measure import plan_in_use

    try:
        target = DatasetConfiguration.load(dataset, plans, configuration)
        yield plan_is_there(target)
        labelled = len(training_cases(target))
        plan, origin = plan_in_use(target)
        yield macl_plan(plan, origin)
        batch_bytes = plan.batch_bytes(len(target.channel_names))
        memory = machine.shared_memory_of_plan(plan_reading_here(batch_bytes), batch_bytes)
        yield replace(memory, check="shared_memory_of_plan")
        sources = sources_in_use(target, plan.unlabelled_datasets, plan.channel_map)
    except UserError as error:
        yield replace(from_error(error), check="plan")
        return
    yield replace(folds(target, device), check="folds")
    yield replace(images(target, labelled, sources), check="images")
    yield replace(readable(target, sources, device, skip_unreadable=plan.skip_unreadable), check="readable")
    yield replace(estimate(target, sources, device, timeout), check="estimate")
    yield replace(weights(target, device), check="weights")


def from_error(error: UserError | str) -> Result:
    """Return a user error as a result. What the message says to type becomes the fix."""
    message, _, fix = str(error).partition("Type:")
    return Result(PROBLEM, message.strip(), fix.strip() or None)


def plan_is_there(target: DatasetConfiguration) -> Result:
    """Return which plan of nnU-Net is used."""
    size = "x".join(map(str, target.patch_size))
    message = f"{target.dataset_name}, {target.plans_name}, {target.name}: patch {size}, {len(target.channel_names)} channel(s)"
    others = [c for c in target.plans_manager.available_configurations if c != target.name]
    if others:
        message += f"; the plan also has {', '.join(others)} (-c)"
    values = {"configuration": target.name, "patch_size": target.patch_size, "other_configurations": others}
    return Result(OK, message, values=values, check="plan")


def folds(target: DatasetConfiguration, device: str) -> Result:
    """Return whether nnU-Net can make the folds for fine-tuning, or read the user's own."""
    file = splits_file(target)
    try:
        number = number_of_folds(target)
        for fold in range(number):
            check_fold(target, fold)
    except UserError as error:
        return from_error(error)
    if not number:
        message, _, example = too_few_cases(target).partition(": echo ")
        fix = command_to_fine_tune(target, device=device) + (f"\necho {example}" if example else "")
        return Result(PROBLEM, message, fix)
    return Result(OK, f"{number} folds, {f'from {file}' if file.is_file() else 'which nnU-Net will make'}")


def macl_plan(plan: MACLPlan, origin: str) -> Result:
    """Return which MACL plan a run would use."""
    message = f"MACL plan, {origin}: batch {plan.batch_size}, {plan.decoder_stages} decoder stage(s)"
    return Result(OK, f"{message}, threshold {plan.threshold:g}", check="macl_plan")


def images(target: DatasetConfiguration, labelled: int, sources: list[Source]) -> Result:
    """Return how many labelled and unlabelled images there are."""
    counts = {source.dataset_name: len(source.cases) + len(source.invalid_cases) for source in sources}
    unlabelled = sum(counts.values())
    message = f"{labelled} labelled images, {unlabelled} unlabelled"
    if len(counts) > 1:
        message += f" ({', '.join(f'{count} of {name}' for name, count in counts.items())})"
    values = {"labelled": labelled, "unlabelled": unlabelled}
    if warnings := [warning for source in sources if (warning := spacing_warning(source, target))]:
        return Result(NOTE, f"{message}; {' '.join(warnings)}", values=values)
    if others := [f"{s.dataset_name}/{name}" for s in sources for name in s.ignored_files]:
        message += f"; {len(others)} files are not named as nnU-Net names images, and are left out: {', '.join(others[:_SHOWN])}"
        return Result(NOTE, message, values=values)
    if unlabelled:
        return Result(OK, message, values=values)
    folder = raw_folder(target.dataset_name) / UNLABELLED_FOLDER
    ending = target.dataset_json["file_ending"]
    fix = f"# put unlabelled images into {folder}, named CASE_0000{ending}, or add -u DATASET2"
    return Result(NOTE, f"{message}: pre-training would use only the labelled images", fix, values)


def readable(
    target: DatasetConfiguration,
    sources: list[Source],
    device: str,
    *,
    skip_unreadable: bool,
    seconds: float = _READ_SECONDS,
) -> Result:
    """Return which unlabelled images cannot be used.

    Images that are not preprocessed yet are read and normalised as in a run, as many as ``seconds`` allow. With
    ``skip_unreadable``, a run leaves out the images that it cannot use.
    """
    wrong = [reason for source in sources for reason in source.invalid_cases.values()]
    flat: list[str] = []
    todo = [(source, case) for source in sources for case in _not_done(target, source)]
    until, read = perf_counter() + seconds, 0
    for source, case in todo:
        if perf_counter() > until:
            break
        read += 1
        try:
            preprocess_case(target, case, source.reader, resample=False)
        except SingleSliceError as error:
            flat.append(str(error))
        except UnusableImageError as error:
            wrong.append(str(error))
        except MemoryError as error:
            raise UserError(f"The memory of this machine is too small to read {error}. Close other programs.") from None
    number = sum(len(case.files) for source in sources for case in source.cases.values())
    values = {"files": number, "skipped": len(wrong) + len(flat), "read": read}
    done = sum(len(source.cases) for source in sources) - len(todo)
    if not wrong and not flat:
        message = f"unlabelled images: {done} preprocessed"
        if todo:
            message += f", {len(todo)} not yet; {read} of these were read without an error"
        return Result(OK, message, values=values)
    left_out = [*wrong, *flat] if skip_unreadable else flat
    if not wrong or skip_unreadable:
        message = f"a run leaves out {pluralise(len(left_out), 'unlabelled image')}:\n{_some(left_out)}"
        return Result(NOTE, message, values=values)
    fix = "# correct or remove these images, or train without them\n"
    fix += f"{command_to_pretrain(target, device=device)} --skip_unreadable"
    message = f"{pluralise(len(wrong), 'unlabelled image')} cannot be used:\n{_some(wrong)}"
    return Result(PROBLEM, message, fix, values)


def _not_done(target: DatasetConfiguration, source: Source) -> list[CaseFiles]:
    """Return the cases of a source that a run would preprocess."""
    index = index_of(target, source)
    return [files for name, files in source.cases.items() if not index.is_done(name, made_of(source, files, index))]


def _some(reasons: list[str]) -> str:
    more = f"\nand {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return "\n".join(reasons[:_SHOWN]) + more


def estimate(target: DatasetConfiguration, sources: list[Source], device: str, timeout: float) -> Result:
    """Return the time, memory and disk space of a run, estimated from three training steps in another process."""
    # made here, because a measurement that takes too long is killed; its workers may still write for a moment
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        quietly = {"nnUNet_results": folder, "nnUNet_wandb_enabled": "0"}
        dataset = target.dataset_name, target.name, target.plans_name
        measured = ask("measure", *dataset, device, timeout=timeout, **quietly)
    if "error" in measured:
        reason = measured["error"].strip().removeprefix("Error: ")
        result = from_error(f"three training steps could not be run on {device}: {reason}")
        # The message about a damaged file says what to do.
        smaller = (
            None if "nnUNetv2_preprocess" in reason else "# use a GPU (-device cuda) or a smaller configuration (-c 2d)"
        )
        return replace(result, fix=result.fix or smaller)
    hours = measured["seconds_per_step"] * measured["steps_per_epoch"] * measured["epochs"] / 3600
    disk = bytes_on_disk(target, sum(len(_not_done(target, source)) for source in sources)) / 2**30
    values = measured | {"hours": hours, "preprocessed_gib": disk}
    message = (
        f"three steps on {device} took {measured['seconds_per_step']:.3g} s each. {measured['epochs']} epochs of "
        f"{measured['steps_per_epoch']} steps take about {_hours(hours)}, {size_text(measured['memory_gib'])} of memory, "
        f"{size_text(disk)} on disk for the images still to be preprocessed and {size_text(measured['run_gib'])} for the run"
    )
    for variable, needed in (("nnUNet_preprocessed", disk), ("nnUNet_results", measured["run_gib"])):
        free = shutil.disk_usage(os.environ[variable]).free / 2**30
        if free < needed:
            message += f"; {variable} has {size_text(free)} free"
            return Result(PROBLEM, message, f"# make space in {variable}", values)
    return Result(NOTE, message, values=values)


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{max(1, round(hours * 60))} min"
    return f"{hours:.0f} h" if hours < 72 else f"{hours / 24:.0f} days (fewer: -num_epochs)"


def weights(target: DatasetConfiguration, device: str) -> Result:
    """Return which weights fine-tuning would start from, and the next command."""
    if named := os.environ.get(WEIGHTS_VARIABLE):
        try:
            _, transfer = load_transfer(Path(named), target)
        except UserError as error:
            message = f"{WEIGHTS_VARIABLE} names weights that cannot be used: {error}"
            return Result(PROBLEM, message, f"unset {WEIGHTS_VARIABLE}")
        loaded = ", ".join("{} of {} tensors of the {}".format(*transfer.count(p), p) for p in ("encoder", "decoder"))
        message = f"fine-tuning loads the weights that {WEIGHTS_VARIABLE} names, {named}: {loaded}"
        return Result(NOTE, message, command_to_fine_tune(target, device=device))
    of_runs = folders_to_start_from(Path(os.environ["nnUNet_results"]), target)
    found = (sorted(file.parent for file in run.glob(f"fold_*/{checkpoints.ENCODER_FILE}")) for run in of_runs)
    folders = next(filter(None, found), [])
    if not folders:
        return Result(NOTE, "no pre-trained weights yet", command_to_pretrain(target, device=device), {"found": []})
    runs = []
    for folder in folders:
        try:
            pretrained = checkpoints.load_weights(folder)
        except UserError as error:
            return from_error(error)
        collapsed = ", COLLAPSED" if pretrained.description.get("collapsed") else ""
        runs.append(f"{folder.name} ({pretrained.description.get('epochs')} epochs{collapsed})")
    command = command_to_fine_tune(target, folders[0].name.removeprefix("fold_"), device)
    values = {"found": [str(folder) for folder in folders]}
    return Result(OK, f"pre-trained weights in {folders[0].parent}: {', '.join(runs)}", command, values)
