"""Find the adapter of a network among the modules of this package."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from nnunetv2_macl import networks
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.networks.base import PretrainableNetwork, check_adapter


@cache
def families() -> tuple[type[PretrainableNetwork], ...]:
    """Return the families of networks that can be pre-trained: each adapter in a module of `nnunetv2_macl.networks`."""
    names = [f"{networks.__name__}.{module.name}" for module in pkgutil.iter_modules(networks.__path__)]
    found = [value for name in names for value in vars(importlib.import_module(name)).values()]
    adapters = [value for value in found if isinstance(value, type) and issubclass(value, PretrainableNetwork)]
    return tuple(dict.fromkeys(adapter for adapter in adapters if adapter.adapts))


def family_of(network_type: type[nn.Module]) -> type[PretrainableNetwork]:
    """Return the family that adapts a network type.

    Raises:
        UserError: There is none, because a network that only looks like one of a family may compute something else.
    """
    for family in families():
        if network_type in family.adapts:
            return family
    known = ", ".join(sorted(adapted.__name__ for family in families() for adapted in family.adapts))
    raise UserError(
        f"The network {network_type.__module__}.{network_type.__qualname__} cannot be pre-trained: no adapter in "
        f"nnunetv2_macl/networks is for it. Networks that can be: {known}. Give a plan of one of these with -p PLANS, or add a "
        "file to nnunetv2_macl/networks with a subclass of PretrainableNetwork for this network (see base.py there)."
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
