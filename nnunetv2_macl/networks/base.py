"""The interface through which pre-training methods use a segmentation network, and the check of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from nnunetv2_macl.errors import UserError

# This is large because GPUs compute convolutions in TF32, and may use another algorithm in the second of two equal calls.
_TOLERANCE = 1e-2


class Level(NamedTuple):
    """One feature map of a network: its number of channels, and its total stride per axis, relative to the image."""

    channels: int
    stride: tuple[int, ...]


class PretrainableNetwork(nn.Module):
    """The part of a segmentation network that is pre-trained: the encoder and the first decoder stages.

    There is one subclass (adapter) per family of networks. It holds the network's own modules, so that training the adapter
    trains the network. It must hold no other modules, because all of its parameters are trained.

    A subclass sets the attributes below, implements `decode` and `last_layer`, and calls ``super().__init__(network,
    decoder_stages)``. In this package it also implements `examples`, which the tests use.

    Attributes:
        adapts: The network types of the family. Subclasses of these types do not belong to the family.
        names: The name that each module of the adapter has in the network, by its name in the adapter, the encoder first.
        encoder_stages: Name in the network of the list of encoder stages.
        encoder: The encoder, which returns the map of each stage. A method may keep a copy, for example a running average.
        encoder_levels: The maps of the encoder stages, the first stage first. The last is the bottleneck.
        decoder_levels: The maps of the held decoder stages. ``decoder_levels[k]`` is the map after k + 1 stages.
        patch_multiple: Divisor of the patch size on each axis.
        only_patch_size: The only patch size that a network with learned position embeddings takes. None: any multiple.
        image_channels: Number of channels of the images.
    """

    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()
    names: ClassVar[dict[str, str]] = {}
    encoder_stages: ClassVar[str] = ""

    encoder: nn.Module
    encoder_levels: list[Level]
    decoder_levels: list[Level]
    patch_multiple: tuple[int, ...]
    only_patch_size: tuple[int, ...] | None = None
    image_channels: int

    def __init__(self, network: nn.Module, decoder_stages: int) -> None:
        """Initialise the module. A subclass then stores the trained modules of the network.

        Args:
            network: A network of one of the types that the family `adapts`.
            decoder_stages: Number of decoder stages to hold, counted from the bottleneck.

        Raises:
            ValueError: The network does not have so many decoder stages.
        """
        super().__init__()

    @staticmethod
    def last_layer(network: nn.Module) -> nn.Module:
        """Return the layer of a network that reads the map of the last decoder stage, for `check_adapter`."""
        raise NotImplementedError

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        """Return a small network of each type of the family with 2 or 3 axes, for tests, or an empty list if there is none."""
        return []

    @classmethod
    def stage_strides(cls, arch_kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Return the stride of each encoder stage, per axis or one number, from the network's arguments in an nnU-Net plan."""
        return arch_kwargs["strides"]

    @classmethod
    def part_of(cls, name: str) -> str | None:
        """Return the name of the adapter's module that holds a weight of the network, or None if the weight is not trained."""
        return next((own for own, there in cls.names.items() if name.startswith(f"{there}.")), None)

    @classmethod
    def stage_of(cls, name: str) -> tuple[str, int] | None:
        """Return the name of the list of stages that holds a weight, and the index of the stage, or None if it is in no stage.

        Encoder stages are counted from the image, decoder stages from the bottleneck.
        """
        for stages in (cls.encoder_stages, *(there for own, there in cls.names.items() if own != "encoder")):
            number = name.removeprefix(f"{stages}.").partition(".")[0]
            if name.startswith(f"{stages}.") and number.isdigit():
                return stages, int(number)
        return None

    @classmethod
    def input_weights(cls, weights: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the kernels that read the images, the encoder's first. The default is its first kernel."""
        return [key for key, weight in weights.items() if cls.part_of(key) == "encoder" and weight.ndim > 2][:1]

    @classmethod
    def stage_differences(
        cls,
        theirs: dict[str, Any],
        ours: dict[str, Any],
        stages: tuple[tuple[str, int], tuple[str, int]],
        *,
        has_norm: bool,
    ) -> list[str]:
        """Return descriptions of the differences between two stages, other than the shapes of their weights.

        Args:
            theirs, ours: Architectures of the family, as nnU-Net's plans describe them.
            stages: The stages to compare, one of each architecture, as `stage_of` returns them.
            has_norm: Whether weights of a norm are transferred.
        """
        (part, there), (_, here) = stages
        compared: list[list[Any]] = []
        kwargs = [architecture.get("arch_kwargs") or {} for architecture in (theirs, ours)]
        if part == cls.encoder_stages and all(isinstance(values.get("strides"), list) for values in kwargs):
            pairs = zip(map(cls.stage_strides, kwargs), (there, here), strict=True)
            compared.append(["stride ", *(strides[n] if n < len(strides) else None for strides, n in pairs)])
        if has_norm:
            compared.append(["", *(str(values.get("norm_op")).rpartition(".")[2] for values in kwargs)])
        return [f"{what}{one} there, {other} here" for what, one, other in compared if one != other]

    @property
    def mixes_samples(self) -> bool:
        """Return whether the maps of an image depend on more than the image, because of batch norm or dropout.

        Such a network computes a batch as a whole, because a part of the batch alone would get other maps.
        """
        return any(map(_mixes_samples, self.modules()))

    def encode(self, images: Tensor, encoder: nn.Module | None = None) -> list[Tensor]:
        """Return the map of each encoder stage, the first stage first.

        Args:
            images: (N, image_channels, *size).
            encoder: A copy of `encoder` that is used instead, for example a momentum encoder.

        Returns:
            Maps of (N, channels, *size / stride), as `encoder_levels` lists them.
        """
        return list((self.encoder if encoder is None else encoder)(images))

    def decode(self, maps: list[Tensor], stages: int | None = None) -> list[Tensor]:
        """Return the bottleneck and the map after each decoder stage.

        Args:
            maps: The result of `encode`.
            stages: Number of decoder stages to compute. None: all held stages.

        Returns:
            The last map of ``maps``, then maps of (N, channels, *size / stride), as `decoder_levels` lists them.
        """
        raise NotImplementedError

    def trained_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights of the encoder and of the decoder stages, by their names in the network's state dict."""
        encoder: dict[str, Tensor] = {}
        decoder: dict[str, Tensor] = {}
        for key, value in self.state_dict().items():
            part, _, rest = key.partition(".")
            (encoder if part == "encoder" else decoder)[f"{self.names[part]}.{rest}"] = value
        return encoder, decoder

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy weights, named as `trained_weights` names them, into the adapter.

        Raises:
            KeyError: The adapter has no weight of that name.
        """
        encoder, decoder = self.trained_weights()
        own = encoder | decoder
        for key, weight in weights.items():
            own[key].copy_(weight)


def check_adapter(family: type[PretrainableNetwork], network: nn.Module) -> None:
    """Check that an adapter with all decoder stages computes what the network computes.

    For a small input, the map of the adapter is compared with the input of the network's `last_layer`. On the meta device, which
    has no values, only the shapes are compared. Random state, batch norm statistics and the mode of each module do not change.

    Args:
        family: The adapter's class.
        network: A network of the family, on any device.

    Raises:
        UserError: The maps differ, or do not have the shapes of the adapter's levels.
    """
    adapter = family(network, len(family(network, 0).encoder_levels) - 1)
    weight = next(network.parameters())
    size = list(adapter.only_patch_size or adapter.patch_multiple)
    if adapter.only_patch_size is None and tuple(size) == adapter.encoder_levels[-1].stride:
        # Instance norm needs two voxels at the bottleneck.
        size[size.index(min(size))] *= 2
    images = torch.randn(1, adapter.image_channels, *size, generator=torch.Generator().manual_seed(0)).to(weight)
    read: list[Tensor] = []
    with _evaluated(network, adapter), torch.no_grad():
        hook = family.last_layer(network).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            network(images)
        finally:
            hook.remove()
        encoded = adapter.encode(images)
        decoded = adapter.decode(encoded)
    levels = [*adapter.encoder_levels, adapter.encoder_levels[-1], *adapter.decoder_levels]
    expected = [(1, level.channels, *_divided(size, level.stride)) for level in levels]
    found = [tuple(values.shape) for values in (*encoded, *decoded)]
    if found != expected:
        problem = f"its maps have the shapes {found}, and its levels say {expected}"
    elif not read:
        problem = "the network does not use the layer that reads its last map"
    elif read[-1].shape != decoded[-1].shape:
        problem = f"its last map has the shape {found[-1]}, and that of the network {tuple(read[-1].shape)}"
    elif not read[-1].is_meta and not _close(decoded[-1], read[-1]):
        problem = "its last map has other values than the map of the network"
    else:
        return
    raise UserError(
        f"The adapter {family.__name__} does not compute what the network {class_name(type(network))} computes: {problem}. "
        f"Pre-training would train another network. Correct {family.__module__}."
    )


def class_name(network_type: type[nn.Module]) -> str:
    """Return the full name of a network type, as in nnU-Net's plans."""
    return f"{network_type.__module__}.{network_type.__qualname__}"


def _mixes_samples(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    # timm and MONAI name the rate of stochastic depth `drop_prob`.
    rate = getattr(module, "drop_prob", None) or 0
    # timm's PatchDropout names its rate `prob`.
    patches = getattr(module, "prob", 0) if type(module).__name__ == "PatchDropout" else 0
    return isinstance(module, _BatchNorm) or rate > 0 or patches > 0


def disable_dropout(module: nn.Module) -> None:
    """Set the rates of dropout and stochastic depth of a module to 0. The modules inside of it keep theirs."""
    if isinstance(module, _DropoutNd):
        module.p = 0.0
    elif getattr(module, "drop_prob", None):
        module.drop_prob = 0.0  # type: ignore[assignment]
    elif type(module).__name__ == "PatchDropout":
        module.prob = 0.0  # type: ignore[assignment]


def _divided(size: list[int], stride: tuple[int, ...]) -> list[int]:
    return [length // step for length, step in zip(size, stride, strict=True)]


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm())


@contextmanager
def _evaluated(*modules: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode within the context, and restore the mode of each afterwards."""
    before = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode
