"""A nnU-Net plan with another network in it: the paper's, a variant of the U-Net, or one of the user's own."""

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

# nnU-Net's own planner does not plan a smaller batch
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
    """Write a nnU-Net plan that is another one but for its network. Preprocessed images serve both.

    A plan of that name with the same network in other configurations gets this configuration too.

    Args:
        dataset: By name or id.
        network: A name of `plannable`, a name in ``plans/networks``, or a JSON file with the keys ``architecture`` and
            ``batch_size``, as nnU-Net's plans have them.
        plans: Identifier of the plan to start from.
        configuration: Of that plan.
        size: One of the sizes of the variant. None takes the widths of the plan, or of the variant's middle size.
        name: Identifier of the new plan. None joins the plan and the network.

    Returns:
        The file, named after the new plan.

    Raises:
        UserError: There is no such plan, configuration, network or size, or the network has other axes.
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
    # with what it inherits, from a configuration that the new plan has not; a cascade's second stage is not in it either
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
            raise UserError(
                f"{target} is there already, and is another plan. Move it away first, or give another name with -o."
            )
        written["configurations"] = configurations | written["configurations"]
    write_json(written, target)
    return target


def variants() -> dict[str, type[EncoderDecoder]]:
    """Return the variants of the U-Net that this package has, by the names of their files."""
    adapted = (network for network, _ in network_types().values())
    return {
        network.__module__.rpartition(".")[2]: network for network in adapted if issubclass(network, EncoderDecoder)
    }


def plannable() -> dict[str, type[EncoderDecoder] | type[PlannedNetwork]]:
    """Return the networks that can be planned, by name: the variants of the U-Net, and networks of other libraries."""
    adapted = (network for network, _ in network_types().values())
    return variants() | {network.variant: network for network in adapted if issubclass(network, PlannedNetwork)}


def explain_changes(dataset: str | int, plans: str, new_plans: str, configuration: str) -> list[str]:
    """Return what differs between a configuration of two plans, as lines for the user."""
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
        f"maps of a training step, in float32: {memory[0]:.1f} -> {memory[1]:.1f} GiB",
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
    """Return whether a nnU-Net plan names a network of this package, which nnU-Net then imports wherever it runs."""
    configurations = read_json(file, "Write it again.")["configurations"].values()
    return any(c["architecture"]["network_class_name"].startswith("nnunetv2_macl.") for c in configurations)


def _variant(start: DatasetConfiguration, network: str, size: str | None) -> dict[str, Any]:
    """Return the keys of a configuration with a variant of its U-Net."""
    kind, axes = plannable()[network], len(start.patch_size)
    file = start.folder / f"{start.plans_name}.json"
    theirs = start.manager.network_arch_class_name
    if family_of(theirs) is not UNet:
        raise UserError(f"{file} has the network {theirs}. Give a plan that nnU-Net made itself with -p.")
    if axes not in kind.axes:
        raise UserError(
            f"{network} has {' or '.join(map(str, kind.axes))} axes, and {start.name} has {axes}. Type: -c "
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
        # as nnU-Net's plans have it: layers are given by name, or are None
        "_kw_requires_import": [key for key in kwargs if key.endswith(("_op", "nonlin"))],
    }
    planned = {"architecture": architecture, "patch_size": _rounded(start.patch_size, kwargs["strides"])}
    return planned | {"batch_size": _batch_size(start, planned)}


def _batch_size(start: DatasetConfiguration, planned: dict[str, Any]) -> int:
    """Return the largest batch up to nnU-Net's whose training step takes no more memory than nnU-Net's own."""
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
    """Return the network of a configuration without values, or another one for the same images and labels."""
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
    """Return a patch size in whole multiples of what a network pools."""
    total = np.prod([np.broadcast_to(stride, len(patch_size)) for stride in strides], axis=0)
    return whole_multiples(patch_size, total.tolist())


def _read(network: str, start: DatasetConfiguration) -> dict[str, Any]:
    """Return the keys of a configuration with the network of a JSON file."""
    folder = resource_folder("plans") / "networks"
    file = Path(network)
    if not file.is_file():
        file = folder / f"{network}.json"
    if not file.is_file():
        names = ", ".join(sorted([*(path.stem for path in folder.glob("*.json")), *plannable()]))
        raise UserError(f"No network '{network}': it is neither a file nor one of {names}.")
    values = read_json(file, "Correct it and try again.")
    try:
        strides = values["architecture"]["arch_kwargs"]["strides"]
        batch_size = values["batch_size"]
    except (TypeError, KeyError):
        raise UserError(
            f"{file} must have architecture, with arch_kwargs and their strides, and batch_size, as nnU-Net's plans have them."
        ) from None
    axes = len(start.patch_size)
    if any(len(np.atleast_1d(stride)) not in (1, axes) for stride in strides):
        raise UserError(
            f"{file} has a network of other axes than {start.name}, which has {axes}. Give another with -c."
        )
    return {
        "architecture": values["architecture"],
        "batch_size": batch_size,
        "patch_size": _rounded(start.patch_size, strides),
    }
