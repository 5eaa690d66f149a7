"""Find the adapter of a network in this package, in an installed package that registers one, or in the network's module."""

from __future__ import annotations

import importlib
import pkgutil
import pydoc
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from dynamic_network_architectures import architectures
from torch import nn

from nnunetv2_macl import networks
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.extensions import announced
from nnunetv2_macl.networks.base import PretrainableNetwork, check_adapter, class_name

ENTRY_POINTS = "nnunetv2_macl.networks"


def families() -> tuple[type[PretrainableNetwork], ...]:
    """Return the adapters of this package and of installed packages, one for each family of networks."""
    return tuple(dict.fromkeys(_adapters("")))


def network_types() -> dict[str, tuple[type[nn.Module], type[PretrainableNetwork]]]:
    """Return all network types that can be pre-trained, with their adapters, by the full name of the type."""
    return {class_name(adapted): (adapted, family) for family in families() for adapted in family.adapts}


def present_name(name: str) -> str:
    """Return the full name of the network that nnU-Net builds for a name in a plan.

    nnU-Net's library of networks has moved some of them, and plans of older versions have the former names. nnU-Net then searches
    the library. Only the library is imported, because the name may be in a file from elsewhere.
    """
    if not name.startswith("dynamic_network_architectures."):
        return name
    if (found := pydoc.locate(name)) is None:
        # imported here, because methods and networks can be used without nnU-Net
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        found = recursive_find_python_class(architectures.__path__[0], name.rpartition(".")[2], architectures.__name__)
    return class_name(found) if isinstance(found, type) else name


def family_of(network: type[nn.Module] | str) -> type[PretrainableNetwork]:
    """Return the adapter of a network type.

    Only the exact type counts, because a subclass may compute something else.

    Args:
        network: The type, or its full name, as in nnU-Net's plans. The name is not imported, see `present_name`.

    Raises:
        UserError: There is no adapter.
    """
    name = present_name(network) if isinstance(network, str) else class_name(network)
    for family in _adapters(name):
        for adapted in family.adapts:
            if class_name(adapted) == name and (isinstance(network, str) or network is adapted):
                return family
    known = ", ".join(sorted(name.rpartition(".")[2] for name in network_types()))
    raise UserError(
        f"The network {name} cannot be pre-trained, because it has no adapter. These networks can be pre-trained: {known}. "
        "Give a plan with one of them by -p PLANS, or write an adapter as described in docs/how_to/own_network.md."
    )


def import_network(name: str) -> None:
    """Import the module of a network that an nnU-Net plan names, as nnU-Net does, so that an adapter in the module is found.

    Raises:
        UserError: The module does not exist, or its code fails.
    """
    try:
        importlib.import_module(present_name(name).rpartition(".")[0])
    # The user's own code can raise any exception.
    except Exception as error:
        raise UserError(
            f"The network {name} cannot be pre-trained, because {name.rpartition('.')[0]} cannot be imported: {error}. Correct "
            "the module, or add its folder to PYTHONPATH."
        ) from error


def pretrainable(network: nn.Module, decoder_stages: int) -> PretrainableNetwork:
    """Return the part of a segmentation network that is pre-trained.

    Args:
        network: The segmentation network. The result holds its modules, not copies.
        decoder_stages: Number of decoder stages to train, counted from the bottleneck.

    Raises:
        UserError: This type of network has no adapter, or its adapter fails `check_adapter`.
        ValueError: The network does not have so many decoder stages.
    """
    family = family_of(type(network))
    check_adapter(family, network)
    return family(network, decoder_stages)


def _adapters(network: str) -> Iterator[type[PretrainableNetwork]]:
    """Yield all adapters, starting with the most likely ones for a network, because some take seconds to import."""
    module = network.rpartition(".")[0]
    if module in sys.modules:
        yield from _adapters_among(vars(sys.modules[module]).values())
    # Files of adapters are named like the module of their networks, and most networks are nnU-Net's own U-Nets.
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
