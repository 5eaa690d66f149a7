"""Compare the results of two checkouts of this project bit by bit on one machine.

    python tests/golden.py OLD NEW [--quick]   compare two checkouts; the exit status is 1 if they differ
    python tests/golden.py --write             write tests/data/golden.json for tests/test_golden.py

Each case is a pre-training of five steps on the CPU with one step per epoch, so that the log holds the loss of each step.
Cases use only `nnunetv2_macl.pretrain` and the files that it writes, because these do not change when the code is rewritten. One
process trains all cases of a checkout one after another on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

CHECKOUT = Path(__file__).resolve().parents[1]
COMMITTED = CHECKOUT / "tests" / "data" / "golden.json"
DATASET = "Dataset901_Generated"
STEPS = 5
BATCH_SIZE = 4
# Relative tolerance, because other processors add numbers in another order.
TOLERANCE = 1e-4
# The parts of a batch have 3 patches and 1 patch.
PATCHES_AT_ONCE = 3

# Recipe files of version 0.1, with the values of the recipes at that time. The package's recipes may change, but such files must
# keep their meaning.
RECIPE_FILES: dict[str, dict[str, Any]] = {
    "macl": {
        "own_view_weight": 0.5, "optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 1e-05,
        "learning_rate_warmup": 0.02,
    },
    "paper": {
        "decoder_stages": 2, "scale": 4, "limit_positives": False, "standardise_projector": False, "optimizer": "sgd",
        "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-05, "schedule": "cosine", "num_epochs": 100,
        "batch_size": 16, "collapse_patience": 0,
    },
}  # fmt: skip
RECIPE_FILES["restore"] = RECIPE_FILES["macl"] | {
    "weight_global": 0.0, "weight_dense": 0.0, "weight_equivariance": 0.0, "weight_restoration": 1.0,
}  # fmt: skip
RECIPE_FILES["macl_restore"] = RECIPE_FILES["macl"] | {
    "weight_global": 0.02, "weight_dense": 0.01, "weight_equivariance": 0.0, "weight_restoration": 1.0, "intensity": 1.0,
    "intensity_on": "variance", "collapse_patience": 0,
}  # fmt: skip
RECIPE_FILES["pcl"] = RECIPE_FILES["macl"] | {
    "decoder_stages": 0, "scale": 1, "weight_dense": 0.0, "weight_equivariance": 0.0, "limit_positives": False,
}  # fmt: skip
RECIPE_FILES["simclr"] = RECIPE_FILES["pcl"] | {"threshold": 0.0, "own_view_weight": 0.0}

# The decay is small, so that five steps show the effect of the averaged encoder.
EMA = {"auxiliary_encoder": "ema", "ema_decay": 0.5}
TWO_STAGES = {"training_stages": 2}
# The committed values have the names that the recipes had in version 0.1.
PRESENT_NAMES = {"macl": "macl_0.1", "macl_restore": "macl"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ema": ("macl", EMA),
    "two_stages": ("macl", TWO_STAGES),
    "two_stages_full_size": ("macl", TWO_STAGES | {"downsample_first_stage": False}),
}


class Case(NamedTuple):
    """One pre-training.

    Attributes:
        recipe: Name of a recipe, or of one of `RECIPE_FILES` with the ending ``.json``.
        settings: Recipe keys that replace those of the recipe.
        configuration: ``2d`` or ``3d_fullres``.
        network: ``plain`` or ``residual``.
        whole: Whether a batch is computed at once instead of in parts.
        processes: Number of processes. torchrun starts more than one.
    """

    name: str
    recipe: str
    settings: dict[str, Any]
    configuration: str
    network: str
    whole: bool
    processes: int = 1


class Result(NamedTuple):
    """The result of a case: loss of each step, norms of the exported weights, and hashes of the weights and checkpoint."""

    losses: list[float]
    norms: list[float]
    exported: str
    checkpoint: list[str]


def make_case(recipe: str, configuration: str, network: str = "plain", whole: bool = True, processes: int = 1) -> Case:
    """Return the case of a recipe, a recipe file or one of `VARIANTS`, with a name that describes it."""
    name = " ".join(
        [recipe, configuration.partition("_")[0], network, "whole" if whole else "parts"]
        + ([f"{processes} processes"] if processes > 1 else [])
    )
    recipe, settings = VARIANTS.get(recipe, (recipe, {}))
    return Case(name, PRESENT_NAMES.get(recipe, recipe), settings, configuration, network, whole, processes)


NAMES = ("macl", "restore", "macl_restore", "paper", "simclr")
CONFIGURATIONS = ("2d", "3d_fullres")
# The class of each network, and the name of its argument for the number of blocks.
NETWORKS = {"plain": ("PlainConvUNet", "n_conv_per_stage"), "residual": ("ResidualEncoderUNet", "n_blocks_per_stage")}


def all_cases() -> list[Case]:
    """Return the cases of a full comparison."""
    networks = list(product(CONFIGURATIONS, NETWORKS, (True, False)))
    cases = [make_case(name, *values) for name in ("macl", "restore", "macl_restore") for values in networks]
    # Half of the combinations is enough, because these cases run the same computation in the other half.
    half = [values for values in networks if (values[1] == "plain") == values[2]]
    cases += [make_case(name, *values) for name in ("paper", "simclr", "ema", "two_stages") for values in half]
    cases += [make_case("two_stages_full_size", "2d")]
    # The package's recipes may change, but recipe files with all values must keep their results.
    cases += [make_case(f"{name}.json", "2d") for name in RECIPE_FILES]
    cases += [make_case(f"{name}.json", "3d_fullres", "residual", whole=False) for name in ("simclr", "restore")]
    cases += [
        make_case(name, "2d", whole=whole, processes=2) for name, whole in (("macl", True), ("macl_restore", False))
    ]
    cases += [make_case("ema", "3d_fullres", "residual", processes=2)]
    return cases


def quick_cases() -> list[Case]:
    """Return one case of each kind, in 2D with the plain network."""
    return [make_case(name, "2d") for name in (*NAMES, *VARIANTS, "simclr.json", "restore.json")]


def committed_cases() -> list[Case]:
    """Return the cases whose values are committed.

    The contrast alone in 3D in parts is left out. Its patches are so small here that five steps amplify the rounding of another
    processor to 1e-3.
    """
    return [
        make_case("macl", "2d"),
        make_case("macl_restore.json", "2d", "residual", whole=False),
        make_case("paper.json", "2d", "residual"),
        make_case("ema", "2d"),
        make_case("two_stages", "2d"),
        make_case("simclr.json", "2d", whole=False),
        make_case("restore.json", "3d_fullres"),
        make_case("macl.json", "3d_fullres"),
        make_case("macl_restore.json", "3d_fullres", "residual", whole=False),
    ]


# --- the data set --------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Generate the data set of the tests, plan and preprocess it with nnU-Net, and write plans of small networks.

    Args:
        folder: Folder for nnU-Net's three folders and ``recipes``.
    """
    from conftest import Workspace, plan_dataset

    plan_dataset(Workspace(folder))
    add_plans(folder)


def add_plans(folder: Path) -> None:
    """Write plans of small networks into the folder of nnU-Net's plan, and write the recipe files.

    Unlabelled images are removed, because preprocessing them again for each plan takes longer than training.

    Args:
        folder: Folder with nnU-Net's three folders, in which the data set is planned and preprocessed in 2D.
    """
    shutil.rmtree(folder / "nnUNet_raw" / DATASET / "imagesUn")
    planned = folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    shutil.rmtree(planned.with_name("nnUNetPlans_macl_2d"))
    for network in NETWORKS:
        plans = json.loads(planned.read_text())
        for configuration, patch, strides in (
            ("2d", [32, 32], [[1, 1], [2, 2], [2, 2], [2, 2]]),
            ("3d_fullres", [8, 32, 32], [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]),
        ):
            values = plans["configurations"][configuration]
            # 3D can use the images preprocessed for 2D, because they are volumes.
            values |= {"patch_size": patch, "batch_size": BATCH_SIZE, "data_identifier": "nnUNetPlans_2d"}
            values["architecture"] = _small(values["architecture"], network, strides)
        plans["configurations"] = {name: plans["configurations"][name] for name in CONFIGURATIONS}
        plans["plans_name"] = f"nnUNetPlans_{network}"
        planned.with_name(f"nnUNetPlans_{network}.json").write_text(json.dumps(plans, indent=4))
    (folder / "recipes").mkdir()
    for name, values in RECIPE_FILES.items():
        (folder / "recipes" / f"{name}.json").write_text(json.dumps(values))


def _small(architecture: dict[str, Any], network: str, strides: list[list[int]]) -> dict[str, Any]:
    """Return the architecture with four narrow stages, of plain or of residual blocks."""
    kwargs = dict(architecture["arch_kwargs"])
    del kwargs["n_conv_per_stage"]
    kernel = [3] * len(strides[0])
    kwargs |= {
        "n_stages": 4, "features_per_stage": [4, 8, 12, 16], "kernel_sizes": [kernel] * 4, "strides": strides,
        "n_conv_per_stage_decoder": [1] * 3,
    }  # fmt: skip
    unet, blocks = NETWORKS[network]
    kwargs[blocks] = [1, 1, 2, 1]
    return architecture | {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{unet}", "arch_kwargs": kwargs,
    }  # fmt: skip


def _environment(folder: Path, checkout: Path) -> dict[str, str]:
    """Return the environment variables for a checkout's package, with nnU-Net's folders in ``folder``."""
    folders = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    return kept | folders | one_thread | {"PYTHONPATH": str(checkout), "nnUNet_extTrainer": str(checkout / "trainers")}


def _run(command: list[str], environment: dict[str, str]) -> None:
    process = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stdout[-8000:]}")


# --- training ------------------------------------------------------------------------------------------------------------


def train(checkout: Path, prepared: Path, cases: Iterable[Case], folder: Path) -> dict[str, Result]:
    """Train cases with a checkout's package in child processes.

    Args:
        checkout: Root of the checkout.
        prepared: Folder that `prepare` has filled. It is copied.
        cases: Cases to train.
        folder: Working folder.

    Returns:
        The results by the name of the case.
    """
    shutil.copytree(prepared, folder)
    results: dict[str, Result] = {}
    cases = list(cases)
    for processes in sorted({case.processes for case in cases}):
        job = {
            "checkout": str(checkout),
            "folder": str(folder),
            "cases": [case for case in cases if case.processes == processes],
            "results": str(folder / f"results_{processes}.json"),
        }
        file = folder / f"job_{processes}.json"
        file.write_text(json.dumps(job))
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        _run([*start, str(Path(__file__).resolve()), "--job", str(file)], _environment(folder, checkout))
        results |= {name: Result(*values) for name, values in json.loads(Path(job["results"]).read_text()).items()}
    return results


def do_job(file: Path) -> None:
    """Train the cases of a job file. This runs in a child process with the environment of the checkout."""
    job = json.loads(file.read_text())
    torch.set_num_threads(1)
    # Keep training on one thread, because the number of threads changes the rounding of sums.
    torch.set_num_threads = lambda number: None
    draw_no_pictures()

    import nnunetv2_macl

    if Path(job["checkout"]).resolve() not in Path(nnunetv2_macl.__file__).resolve().parents:
        raise SystemExit(f"The package is imported from {nnunetv2_macl.__file__} and not from {job['checkout']}.")
    results = {}
    for values in job["cases"]:
        case = Case(*values)
        result = train_case(case, Path(job["folder"]))
        if result is not None:
            results[case.name] = result
    if results:
        Path(job["results"]).write_text(json.dumps(results))


def draw_no_pictures() -> None:
    """Disable pictures and the report, which take longer than five steps and do not influence the training."""
    from matplotlib import pyplot

    from nnunetv2_macl.errors import UserError

    def refuse(*arguments: Any, **named: Any) -> None:
        raise UserError("A comparison draws no pictures.")

    pyplot.subplots = refuse


def train_case(case: Case, folder: Path) -> Result | None:
    """Train a case and return its result, or None in all processes but the first."""
    import nnunetv2_macl

    settings = {"num_epochs": STEPS, "num_iterations_per_epoch": 1, "batch_size": BATCH_SIZE, "collapse_patience": 0}
    settings["patches_at_once"] = BATCH_SIZE if case.whole else PATCHES_AT_ONCE
    if case.processes > 1:
        settings["patches_at_once"] = 2 if case.whole else 1
    is_file = case.recipe.endswith(".json")
    run = nnunetv2_macl.pretrain(
        DATASET,
        case.configuration,
        plans=f"nnUNetPlans_{case.network}",
        recipe=folder / "recipes" / case.recipe if is_file else case.recipe,
        processes=1,
        device="cpu",
        **settings | case.settings,
    )
    if int(os.environ.get("RANK", 0)):
        return None
    result = read_result(run)
    shutil.rmtree(run.parent)
    return result


def read_result(run: Path) -> Result:
    """Return the result of a run from its folder."""
    checkpoint = torch.load(run / "checkpoint_final.pth", map_location="cpu", weights_only=True)
    exported = []
    for name in ("macl_encoder.pth", "macl_decoder.pth"):
        weights = torch.load(run / name, map_location="cpu", weights_only=True)["network_weights"]
        exported += [(key, weights[key]) for key in sorted(weights)]
    whole = hashlib.sha256()
    for key, value in exported:
        whole.update(f"{key} {_hash(value)}\n".encode())
    trained = {"weights": checkpoint["network_weights"], "optimizer": checkpoint["optimizer_state"]}
    return Result(
        losses=[float(loss) for loss in _training_losses(checkpoint)],
        norms=[float(value.double().norm()) for _, value in exported if value.ndim > 1],
        exported=whole.hexdigest()[:12],
        # Hash only the values, because names may change.
        checkpoint=sorted({_hash(tensor) for tensor in _tensors(trained)}),
    )


def _training_losses(checkpoint: dict[str, Any]) -> list[float]:
    """Return the loss of each step from the log, in which each epoch has one step."""
    logging = checkpoint["logging"]
    losses = logging["train_losses"] if "train_losses" in logging else logging["local_logger"]["train_losses"]
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        raise SystemExit(f"Expected the losses of {STEPS} steps, got {losses}.")
    return losses


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    """Yield all tensors in nested dictionaries and lists, except the optimiser's step counters."""
    if isinstance(value, torch.Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _hash(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().numpy()
    return hashlib.sha256(f"{content.shape} {content.dtype} ".encode() + content.tobytes()).hexdigest()[:12]


# --- comparing -----------------------------------------------------------------------------------------------------------


def compare(old: Path, new: Path, cases: list[Case]) -> bool:
    """Train cases with two checkouts, print a line for each case, and return whether all results are equal."""
    with tempfile.TemporaryDirectory(prefix="golden_") as temporary:
        folder = Path(temporary)
        prepare(folder / "prepared")
        before, after = (
            train(checkout, folder / "prepared", cases, folder / name)
            for name, checkout in (("old", old), ("new", new))
        )
    for case in cases:
        theirs, ours = before[case.name], after[case.name]
        losses = " ".join(f"{loss:.9g}" for loss in ours.losses)
        print(f"{case.name:38} {losses:60} {ours.exported} {_difference(theirs, ours)}")
    different = [case.name for case in cases if before[case.name] != after[case.name]]
    print(f"{len(cases)} cases, {len(different)} of them differ.")
    return not different


def _difference(old: Result, new: Result) -> str:
    """Return ``equal``, or ``DIFFERENT`` with a list of the differences."""
    if old == new:
        return "equal"
    found = []
    if old.losses != new.losses:
        found.append("losses, before: " + " ".join(f"{loss:.9g}" for loss in old.losses))
    if old.exported != new.exported:
        found.append(f"exported weights, before: {old.exported}")
    if old.checkpoint != new.checkpoint:
        gone, added = set(old.checkpoint) - set(new.checkpoint), set(new.checkpoint) - set(old.checkpoint)
        found.append(f"tensors of the checkpoint: {len(gone)} of {len(old.checkpoint)} are gone, {len(added)} are new")
    return "DIFFERENT (" + "; ".join(found) + ")"


def write_committed() -> None:
    """Write the expected values of tests/test_golden.py."""
    with tempfile.TemporaryDirectory(prefix="golden_") as temporary:
        folder = Path(temporary)
        prepare(folder / "prepared")
        results = train(CHECKOUT, folder / "prepared", committed_cases(), folder / "run")
    content = {name: {"losses": result.losses, "norms": result.norms} for name, result in results.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in content.items())
    COMMITTED.write_text(f"{{\n{lines}\n}}\n")
    print(f"Wrote {COMMITTED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="root of a checkout")
    parser.add_argument("new", type=Path, nargs="?", help="root of another checkout")
    parser.add_argument("--quick", action="store_true", help="one case of each kind, in 2D on the plain network")
    parser.add_argument("--write", action="store_true", help="write the committed values from this checkout")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        do_job(arguments.job)
    elif arguments.write:
        write_committed()
    elif arguments.old is None or arguments.new is None:
        parser.error("give two checkouts, or --write")
    else:
        cases = quick_cases() if arguments.quick else all_cases()
        if not compare(arguments.old.resolve(), arguments.new.resolve(), cases):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
