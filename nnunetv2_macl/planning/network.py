"""A nnU-Net plan with another network in it: the paper's, or one of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder, write_json
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json


def plan_network(dataset: str | int, network: str, plans: str = "nnUNetPlans", configuration: str = "2d") -> Path:
    """Write a nnU-Net plan that is another one but for its network. Preprocessed images serve both.

    Args:
        dataset: by name or id.
        network: a name in ``plans/networks``, or a JSON file with the keys ``architecture`` and ``batch_size``, as nnU-Net's
            plans have them.
        plans: identifier of the plan to start from.
        configuration: of that plan.

    Returns:
        The file, named after plan and network.

    Raises:
        UserError: no such plan, configuration or network, or a network of other axes.
    """
    start = DatasetConfiguration.load(dataset, plans, configuration)
    file, values = _read(network)
    kwargs = values["architecture"]["arch_kwargs"]
    axes = len(start.patch_size)
    if any(len(np.atleast_1d(stride)) not in (1, axes) for stride in kwargs["strides"]):
        raise UserError(
            f"{file} has a network of other axes than {configuration}, which has {axes}. Give another with -c."
        )
    strides = np.prod([np.broadcast_to(stride, axes) for stride in kwargs["strides"]], axis=0)
    name = f"{plans}_{file.stem}"
    # whole multiples of what the network pools
    patch = [int(max(1, round(n / s)) * s) for n, s in zip(start.patch_size, strides, strict=True)]
    content = start.plans_manager.plans
    # with what it inherits, from a configuration that the new plan has not
    own = {key: value for key, value in start.manager.configuration.items() if key != "inherits_from"}
    written = content | {
        "plans_name": name,
        "configurations": {
            configuration: own | {"patch_size": patch} | {key: values[key] for key in ("architecture", "batch_size")}
        },
    }
    target = start.folder / f"{name}.json"
    if target.is_file() and read_json(target, f"Remove it: {target}") != written:
        raise UserError(f"{target} is there already, and is another plan. Move it away first.")
    write_json(written, target)
    return target


def needs_this_package(file: Path) -> bool:
    """Return whether a nnU-Net plan names a network of this package, which nnU-Net then imports wherever it runs."""
    configurations = read_json(file, "Write it again.")["configurations"].values()
    return any(c["architecture"]["network_class_name"].startswith("nnunetv2_macl.") for c in configurations)


def _read(network: str) -> tuple[Path, dict[str, Any]]:
    folder = resource_folder("plans") / "networks"
    file = Path(network)
    if not file.is_file():
        file = folder / f"{network}.json"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise UserError(f"No network '{network}': it is neither a file nor one of {names}.")
    values = read_json(file, "Correct it and try again.")
    try:
        kwargs = values["architecture"]["arch_kwargs"]
        complete = "strides" in kwargs and "batch_size" in values
    except (TypeError, KeyError):
        complete = False
    if not complete:
        raise UserError(
            f"{file} must have architecture, with arch_kwargs and their strides, and batch_size, as nnU-Net's plans have them."
        )
    return file, values
