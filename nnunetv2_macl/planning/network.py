"""Write an nnU-Net plan with another network: the paper's, a variant of the U-Net, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import resource_folder, write_json
from nnunetv2_macl.networks.base import class_name
from nnunetv2_macl.networks.encoder_decoder import EncoderDecoder
from nnunetv2_macl.networks.planned import PlannedNetwork, whole_multiples
from nnunetv2_macl.networks.registry import family_of, network_types
from nnunetv2_macl.networks.unet import UNet
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json
from nnunetv2_macl.planning.memory import training_memory
from nnunetv2_macl.text import size_text

# nnU-Net's planner does not plan a smaller batch.
_SMALLEST_BATCH = 2


def plan_network(
    dataset: str | int,
    network: str,
    plans: str = "nnUNetPlans",
    configuration: str = "2d",
    *,
    size: str | None = None,
    name: str | None = None,
) -> Path:
    """Write a copy of an nnU-Net plan with another network. Both plans use the same preprocessed labelled images.

    If a plan of that name exists and has the same network in other configurations, this configuration is added to it.

    Args:
        dataset: Name or id of the data set.
        network: A name in `plannable`, a name in ``plans/networks``, or a JSON file with the keys ``architecture`` and
            ``batch_size``, as in nnU-Net's plans.
        plans: Identifier of the plan to start from.
        configuration: Name of a configuration of that plan.
        size: One of the sizes of the variant. None uses the widths of the plan, or those of the variant's middle size.
        name: Identifier of the new plan. None joins the names of plan, network and size.

    Returns:
        The file of the new plan.

    Raises:
        UserError: There is no such plan, configuration, network or size, the network has another number of axes, or another
            plan of that name exists.
    """
    start = DatasetConfiguration.load(dataset, plans, configuration)
    if start.is_cascaded:
        raise UserError(
            f"{configuration} of {plans} is the second stage of a cascade, which this command does not plan. Give another "
            "configuration with -c."
        )
    if network in plannable():
        values = _variant(start, network, size)
    elif size is not None:
        raise UserError(f"The network '{network}' has no sizes. Leave out -size {size}.")
    else:
        values = _read(network, start)
    name = name or "_".join(filter(None, (plans, Path(network).stem, size)))
    content = start.plans_manager.plans
    # Remove references to other configurations, because the new plan does not contain them. Inherited values are resolved.
    own = {
        key: value for key, value in start.manager.configuration.items() if key not in ("inherits_from", "next_stage")
    }
    new = own | values
    written = content | {"plans_name": name, "configurations": {configuration: new}}
    target = start.folder / f"{name}.json"
    if target.is_file():
        there = read_json(target, f"Remove it: {target}")
        others: dict[str, Any] = {"configurations": {}}
        is_same_plan = isinstance(there, dict) and there | others == written | others
        configurations = there["configurations"] if is_same_plan else {}
        if not is_same_plan or configurations.get(configuration, new) != new:
            raise UserError(f"{target} exists and is another plan. Move it away first, or give another name with -o.")
        written["configurations"] = configurations | written["configurations"]
    write_json(written, target)
    return target


def variants() -> dict[str, type[EncoderDecoder]]:
    """Return the variants of the U-Net in this package, by the names of their files."""
    adapted = (network for network, _ in network_types().values())
    return {
        network.__module__.rpartition(".")[2]: network for network in adapted if issubclass(network, EncoderDecoder)
    }


def plannable() -> dict[str, type[EncoderDecoder] | type[PlannedNetwork]]:
    """Return the networks that can be planned, by name: the variants of the U-Net, and networks of other libraries."""
    adapted = (network for network, _ in network_types().values())
    return variants() | {network.variant: network for network in adapted if issubclass(network, PlannedNetwork)}


def explain_changes(dataset: str | int, plans: str, new_plans: str, configuration: str) -> list[str]:
    """Return lines for the user that describe the differences of a configuration between two plans."""
    before, after = (DatasetConfiguration.load(dataset, name, configuration) for name in (plans, new_plans))
    networks = [_on_meta(c) for c in (before, after)]
    numbers = [sum(weight.numel() for weight in network.parameters()) / 1e6 for network in networks]
    memory = [
        training_memory(network, len(c.channel_names), c.manager.batch_size, c.patch_size) / 2**30
        for network, c in zip(networks, (before, after), strict=True)
    ]
    lines = [
        f"network: {type(networks[0]).__name__} -> {type(networks[1]).__name__}",
        f"parameters: {numbers[0]:.1f} -> {numbers[1]:.1f} million",
        f"memory of the maps of a training step in float32: {size_text(memory[0])} -> {size_text(memory[1])}",
    ]
    compared = [
        ("patch_size", before.patch_size, after.patch_size),
        ("batch_size", before.manager.batch_size, after.manager.batch_size),
        *(
            (key, before.manager.network_arch_init_kwargs.get(key), value)
            for key, value in after.manager.network_arch_init_kwargs.items()
        ),
    ]
    return lines + [f"{key}: {one} -> {other}" for key, one, other in compared if one is not None and one != other]


def needs_this_package(file: Path) -> bool:
    """Return whether an nnU-Net plan names a network of this package, so that nnU-Net needs the package."""
    configurations = read_json(file, "Write it again.")["configurations"].values()
    return any(c["architecture"]["network_class_name"].startswith("nnunetv2_macl.") for c in configurations)


def _variant(start: DatasetConfiguration, network: str, size: str | None) -> dict[str, Any]:
    """Return the changed keys of a configuration whose U-Net is replaced by a variant."""
    kind, axes = plannable()[network], len(start.patch_size)
    file = start.folder / f"{start.plans_name}.json"
    theirs = start.manager.network_arch_class_name
    if family_of(theirs) is not UNet:
        raise UserError(f"{file} has the network {theirs}, not a U-Net. Give a plan of nnU-Net's planner with -p.")
    if axes not in kind.axes:
        raise UserError(
            f"{network} needs {' or '.join(map(str, kind.axes))} axes, and {start.name} has {axes}. Use: -c "
            + ("2d" if 2 in kind.axes else "3d_fullres")
        )
    if size is not None and size not in kind.sizes:
        sizes = f"one of {', '.join(kind.sizes)}" if kind.sizes else "no sizes: leave out -size"
        raise UserError(f"{network} has no size '{size}'. It has {sizes}.")
    unet = start.manager.network_arch_init_kwargs
    kwargs = kind.planned(unet, start.patch_size, size)
    architecture = {
        "network_class_name": class_name(kind),
        "arch_kwargs": kwargs,
        # As in nnU-Net's plans, these keys hold the names of layers, or None.
        "_kw_requires_import": [key for key in kwargs if key.endswith(("_op", "nonlin"))],
    }
    planned = {"architecture": architecture, "patch_size": _rounded(start.patch_size, kwargs["strides"])}
    return planned | {"batch_size": _batch_size(start, planned)}


def _batch_size(start: DatasetConfiguration, planned: dict[str, Any]) -> int:
    """Return the largest batch size, at most nnU-Net's, whose training step needs no more memory than nnU-Net's."""
    channels = len(start.channel_names)
    limit = training_memory(_on_meta(start), channels, start.manager.batch_size, start.patch_size)
    network = _on_meta(start, planned["architecture"])
    fitting = (
        batch
        for batch in range(start.manager.batch_size, _SMALLEST_BATCH, -1)
        if training_memory(network, channels, batch, planned["patch_size"]) <= limit
    )
    return next(fitting, _SMALLEST_BATCH)


def _on_meta(configuration: DatasetConfiguration, architecture: dict[str, Any] | None = None) -> nn.Module:
    """Return the network of a configuration, or of another architecture for the same data, on the meta device."""
    architecture = architecture or configuration.manager.configuration["architecture"]
    labels = configuration.plans_manager.get_label_manager(configuration.dataset_json)
    with torch.device("meta"):
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            len(configuration.channel_names),
            labels.num_segmentation_heads,
            allow_init=False,
            deep_supervision=True,
        )


def _rounded(patch_size: Sequence[int], strides: Sequence[Any]) -> list[int]:
    """Return a patch size rounded to multiples of the network's total stride.

    The smallest map has more than one point, because an instance norm cannot be trained on a single point.
    """
    total = np.prod([np.broadcast_to(stride, len(patch_size)) for stride in strides], axis=0).tolist()
    rounded = whole_multiples(patch_size, total)
    if rounded == total:
        rounded[int(np.argmin(rounded))] *= 2
    return rounded


def _read(network: str, start: DatasetConfiguration) -> dict[str, Any]:
    """Return the changed keys of a configuration whose network is replaced by that of a JSON file."""
    folder = resource_folder("plans") / "networks"
    file = Path(network)
    if not file.is_file():
        file = folder / f"{network}.json"
    if not file.is_file():
        names = ", ".join(sorted([*(path.stem for path in folder.glob("*.json")), *plannable()]))
        raise UserError(f"There is no network '{network}'. Give a JSON file, or one of {names}.")
    values = read_json(file, "Correct it and try again.")
    try:
        architecture, batch_size = values["architecture"], values["batch_size"]
        strides = architecture["arch_kwargs"]["strides"]
        is_complete = {"network_class_name", "_kw_requires_import"} <= architecture.keys() and isinstance(strides, list)
    except (TypeError, KeyError, AttributeError):
        is_complete = False
    if not is_complete or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(
            f"{file} must have 'batch_size', a number, and 'architecture' with 'network_class_name', '_kw_requires_import' and "
            "'arch_kwargs' with a list of 'strides', as in nnU-Net's plans. Correct the file."
        )
    axes = len(start.patch_size)
    if any(len(np.atleast_1d(stride)) not in (1, axes) for stride in strides):
        raise UserError(
            f"The strides in {file} do not have the {axes} axes of {start.name}. Give another configuration with -c."
        )
    try:
        _on_meta(start, architecture)
    except Exception as error:  # of the network's own code
        raise UserError(
            f"The network in {file} cannot be built: {type(error).__name__}: {error}. Correct the file."
        ) from error
    return {
        "architecture": architecture,
        "batch_size": batch_size,
        "patch_size": _rounded(start.patch_size, strides),
    }
