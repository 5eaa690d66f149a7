"""Find the adapter of a network among the modules of this package."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from nnunetv2_macl import networks
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.networks.base import PretrainableNetwork, check_adapter, class_name


@cache
def families() -> tuple[type[PretrainableNetwork], ...]:
    """Return the families of networks that can be pre-trained: each adapter in a module of `nnunetv2_macl.networks`."""
    names = [f"{networks.__name__}.{module.name}" for module in pkgutil.iter_modules(networks.__path__)]
    found = [value for name in names for value in vars(importlib.import_module(name)).values()]
    adapters = [value for value in found if isinstance(value, type) and issubclass(value, PretrainableNetwork)]
    return tuple(dict.fromkeys(adapter for adapter in adapters if adapter.adapts))


@cache
def network_types() -> dict[str, tuple[type[nn.Module], type[PretrainableNetwork]]]:
    """Return each network type that can be pre-trained, with its family, by the type's full name."""
    return {class_name(adapted): (adapted, family) for family in families() for adapted in family.adapts}


def family_of(network: type[nn.Module] | str) -> type[PretrainableNetwork]:
    """Return the family that adapts a network type.

    Args:
        network: The type, or its full name, as nnU-Net's plans give it. Nothing is imported by that name.

    Raises:
        UserError: There is none. A network that only looks like one of a family may compute something else.
    """
    name = network if isinstance(network, str) else class_name(network)
    adapted, family = network_types().get(name, (None, None))
    if family is not None and network in (name, adapted):
        return family
    known = ", ".join(sorted(name.rpartition(".")[2] for name in network_types()))
    raise UserError(
        f"The network {name} cannot be pre-trained: no adapter in nnunetv2_macl/networks is for it. These networks can be "
        f"pre-trained: {known}. Give a plan of one of them with -p PLANS, or add a file with a subclass of PretrainableNetwork "
        "for this network to nnunetv2_macl/networks, as base.py there describes it."
    )


def pretrainable(network: nn.Module, decoder_stages: int) -> PretrainableNetwork:
    """Return the part of a segmentation network that is pre-trained.

    Args:
        network: The network, as it is built for segmentation. The result holds its modules, not copies.
        decoder_stages: Number of decoder stages to train, counted from the bottleneck.

    Raises:
        UserError: No family adapts this type of network, or its adapter fails `check_adapter`.
        ValueError: The network does not have so many decoder stages.
    """
    family = family_of(type(network))
    check_adapter(family, network)
    return family(network, decoder_stages)
