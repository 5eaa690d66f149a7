"""Find the adapter of a network in this package, in an installed package that announces one, or in the network's own module."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from nnunetv2_macl import networks
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.extensions import announced
from nnunetv2_macl.networks.base import PretrainableNetwork, check_adapter, class_name

ENTRY_POINTS = "nnunetv2_macl.networks"


def families() -> tuple[type[PretrainableNetwork], ...]:
    """Return the families of networks that can be pre-trained, of this package and of installed ones."""
    return tuple(dict.fromkeys(_adapters("")))


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
    for family in _adapters(name):
        for adapted in family.adapts:
            if class_name(adapted) == name and network in (name, adapted):
                return family
    known = ", ".join(sorted(name.rpartition(".")[2] for name in network_types()))
    raise UserError(
        f"The network {name} cannot be pre-trained: there is no adapter for it. These networks can be pre-trained: {known}. "
        "Give a plan of one of them with -p PLANS, or write an adapter, as docs/how_to/own_network.md shows it."
    )


def import_network(name: str) -> None:
    """Import the module of a network that an nnU-Net plan names, as nnU-Net does, so that an adapter in it is found.

    Raises:
        UserError: The module is not there, or its own code fails.
    """
    module = name.rpartition(".")[0]
    try:
        importlib.import_module(module)
    # The user's own code can raise any exception.
    except Exception as error:
        raise UserError(
            f"The network {name} cannot be pre-trained, because {module} cannot be imported: {error}. Correct it, or add its "
            "folder to PYTHONPATH."
        ) from error


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


def _adapters(network: str) -> Iterator[type[PretrainableNetwork]]:
    """Yield all adapters, those first that are likely to be for a network, because some take seconds to import."""
    module = network.rpartition(".")[0]
    if module in sys.modules:
        yield from _adapters_among(vars(sys.modules[module]).values())
    # A file here is named like the module of the networks that it is for, and most networks are nnU-Net's own.
    names = sorted(module.name for module in pkgutil.iter_modules(networks.__path__))
    likely = [name for name in dict.fromkeys((module.rpartition(".")[2], "unet")) if name in names]
    yield from _own_adapters(likely)
    yield from _adapters_among(announced(ENTRY_POINTS))
    yield from _own_adapters(name for name in names if name not in likely)


def _own_adapters(names: Iterable[str]) -> Iterator[type[PretrainableNetwork]]:
    for name in names:
        yield from _adapters_among(vars(importlib.import_module(f"{networks.__name__}.{name}")).values())


def _adapters_among(values: Iterable[Any]) -> Iterator[type[PretrainableNetwork]]:
    for value in list(values):
        if isinstance(value, type) and issubclass(value, PretrainableNetwork) and value.adapts:
            yield value
