"""Transfer pre-trained weights to another network: load or adapt those that fit, and say why the others do not fit.

The functions work on state dicts. The family of the network recognises stages by the names of their weights, see `networks.base`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunetv2_macl.checkpoints import PretrainedWeights, first_difference, first_names
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.networks.base import PretrainableNetwork, class_name
from nnunetv2_macl.networks.registry import family_of, present_name

# Smallest share of the encoder's parameters. With less, fine-tuning would start from an almost random network.
SMALLEST_SHARE = 0.25

AS_IT_IS, ADAPTED, NOT_TAKEN = "as it is", "adapted", "not loaded"

# The layers that may be between a convolution and its norm, because their output scales with their input.
_SCALE_WITH_THEIR_INPUT = (_DropoutNd, nn.ReLU, nn.LeakyReLU)
_ANYWAY = "segmentation layers always start from random weights"


@dataclass(frozen=True)
class TransferRow:
    """The transfer to one part of the target network."""

    part: str  # Name of the part, such as ``encoder.stages.0``
    is_encoder: bool  # Whether the part belongs to the encoder
    taken: int  # Number of tensors that are loaded
    tensors: int  # Number of tensors of the part
    how: str  # `AS_IT_IS`, `ADAPTED` or `NOT_TAKEN`
    why: str = ""  # Differences, and why tensors are not loaded


class TooLittleFitsError(UserError):
    """Raised if too few pre-trained weights fit the target. ``transfer`` holds the weights that fit."""

    def __init__(self, message: str, transfer: Transfer) -> None:
        super().__init__(message)
        self.transfer = transfer


@dataclass(frozen=True)
class Transfer:
    """Weights for a target network, and where they come from."""

    weights: dict[str, Tensor]  # Weights for the target's state dict, under all their names there
    rows: list[TransferRow]  # One row for each part of the target
    difference: str | None  # First difference of the two architectures; None if they are the same

    def count(self, part: str) -> tuple[int, int]:
        """Return the number of loaded tensors and of all tensors of a part, ``encoder`` or ``decoder``."""
        rows = [row for row in self.rows if row.is_encoder == (part == "encoder")]
        return sum(row.taken for row in rows), sum(row.tensors for row in rows)

    def table(self) -> str:
        """Return the rows as aligned text, one per line."""
        lines = [("part", "tensors loaded", "how", "why")]
        lines += [(row.part, f"{row.taken} of {row.tensors}", row.how, row.why) for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in lines
        )


def plan_transfer(
    pretrained: PretrainedWeights,
    state: dict[str, Tensor],
    architecture: dict[str, Any],
    *,
    image_channels: int | None = None,
    channel_names: tuple[Sequence[str], Sequence[str]] = ((), ()),
    advice: str = "Pre-train for this one: nnUNetv2_train_macl_pretrain DATASET -c CONFIGURATION",
) -> Transfer:
    """Fit pre-trained weights to a network.

    A stage gets the weights of the stage at the same depth. If more of the encoder fits from the stage above or below, all
    stages get those. A convolution with its bias and norm is loaded as a whole, and only if all shapes are equal. Only
    convolutions of the images are adapted: to another number of input channels, see `fit_input_channels`, or to another
    order of channels. If the source network has no norm after a convolution, the target keeps its own norm.

    Args:
        pretrained: The weights, and the architecture that they were trained in.
        state: The target's state dict. It gives names and shapes, and the weights that extra input channels keep.
        architecture: Architecture of the target, as `DatasetConfiguration.architecture` returns it.
        image_channels: Number of the target's first input channels that are images. None: all. The other channels, the
            segmentation from the first stage of a cascade, keep the target's own weights.
        channel_names: Channel names of the source and of the target; empty if they are not known.
        advice: What the user can do if the weights do not fit, as a sentence.

    Raises:
        TooLittleFitsError: Less than a quarter of the encoder's parameters fits. The message names the first difference.
        UserError: The networks belong to different families.
    """
    files = ", ".join(str(file) for file in pretrained.files)
    there, here = (present_name(str(a.get("network_class_name"))) for a in (pretrained.architecture, architecture))
    family = family_of(here)
    if there not in map(class_name, family.adapts):
        raise UserError(
            f"The weights in {files} are for another kind of network ({there}) than yours ({here}), so their stages do not "
            f"correspond. {advice}"
        )
    difference = first_difference(pretrained.architecture, architecture)
    channels = image_channels, channel_names
    plans = [_StageMapping(family, pretrained, state, architecture, *channels, offset) for offset in (0, -1, 1)]
    encoder = [key for key in state if family.part_of(key) == "encoder"]

    def fitting(plan: _StageMapping) -> tuple[int, int]:
        """Return the number of parameters that fit in the encoder, which the decoder stages depend on, and in total."""
        return _parameters(state, (key for key in encoder if key in plan.sources)), _parameters(state, plan.sources)

    # Of equal plans, max returns the first, which is the one for the same depth.
    best = max(plans, key=fitting)
    share = fitting(best)[0] / max(1, _parameters(state, encoder))
    transfer = Transfer(best.weights(), best.rows(), difference)
    if share < SMALLEST_SHARE:
        why = difference or "the file does not hold a complete encoder"
        # Round down, so that a share just below the limit is not shown as the limit.
        percent = math.floor(1000 * share) / 10
        raise TooLittleFitsError(
            f"The weights in {files} are for another network: only {percent}% of your network's encoder can be loaded "
            f"from them, and at least {SMALLEST_SHARE:.0%} are required; {why}. {advice}",
            transfer,
        )
    return transfer


def fit_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt a convolution's weight to another number of input channels, with the same response to equal inputs.

    For more channels, the weights of the channels are repeated in turn and divided by the number of their copies. For fewer
    channels, they are assigned to the new channels in turn and added. The sum over input channels does not change.

    Args:
        weight: Weight of the convolution, (C_out, C_in, *kernel).
        channels: New number of input channels C_new, 1 or more.

    Returns:
        (C_out, C_new, *kernel).

    Raises:
        ValueError: ``channels`` is less than 1.
    """
    if channels < 1:
        raise ValueError(f"channels must be 1 or more, got {channels}")
    own = weight.shape[1]
    order = torch.arange(max(own, channels), device=weight.device)
    copies = torch.bincount(order % own).to(weight.dtype)
    dealt = (weight / copies.view(1, -1, *[1] * (weight.ndim - 2)))[:, order % own]
    fitted = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
    return fitted.index_add_(1, order % channels, dealt)


def kernel_norms(network: nn.Module) -> dict[str, float]:
    """Return the L2 norms of the kernels that an instance norm follows, by the name of the block. Their scale does not matter."""
    return {name: float(block.conv.weight.detach().norm()) for name, block in _scale_free(network).items()}


def rescale_kernels(network: nn.Module, norms: dict[str, float]) -> None:
    """Scale kernels back to the norms of a fresh network. The output of the network stays the same.

    Kernels grow during pre-training, to 2.6 times in 16,000 steps of AdamW. If an instance norm follows, the effective learning
    rate of a kernel is the learning rate divided by the kernel's squared norm. So SGD at nnU-Net's rate would hardly change a
    large kernel.

    Source: van Laarhoven, L2 regularization versus batch and weight normalization, 2017, https://arxiv.org/abs/1706.05350

    Args:
        network: A U-Net of dynamic-network-architectures.
        norms: Norms of its kernels, as `kernel_norms` returned them before pre-trained weights were loaded.
    """
    grown = kernel_norms(network)
    with torch.no_grad():
        for name, block in _scale_free(network).items():
            for parameter in block.conv.parameters() if grown[name] else ():
                parameter.mul_(norms[name] / grown[name])


def _scale_free(network: nn.Module) -> dict[str, Any]:
    return {
        name: block
        for name, block in network.named_modules()
        if isinstance(block, ConvDropoutNormReLU) and _forgets_scale(block)
    }


def _forgets_scale(block: ConvDropoutNormReLU) -> bool:
    norm = getattr(block, "norm", None)
    # The running statistics of a norm, as in a batch norm, would have to be scaled, too.
    if not isinstance(norm, _InstanceNorm) or norm.track_running_stats:
        return False
    layers = list(block.all_modules)
    return all(isinstance(layer, _SCALE_WITH_THEIR_INPUT) for layer in layers[1 : layers.index(norm)])


class _StageMapping:
    """One mapping between the stages of the two networks: target stage s gets the weights of source stage s + offset."""

    def __init__(
        self,
        family: type[PretrainableNetwork],
        pretrained: PretrainedWeights,
        state: dict[str, Tensor],
        architecture: dict[str, Any],
        image_channels: int | None,
        channel_names: tuple[Sequence[str], Sequence[str]],
        offset: int,
    ) -> None:
        self.family, self.source, self.state, self.offset = family, pretrained.weights, state, offset
        self.elsewhere, self.channel_names = pretrained.elsewhere, channel_names
        self.architectures = pretrained.architecture, architecture
        self.first_names = first_names(state)
        # nnU-Net's decoder contains the encoder a second time.
        self.own = [key for key, first in self.first_names.items() if family.part_of(key) == family.part_of(first)]
        self.depths = (_depth(family, self.source) or _depth(family, state), _depth(family, state))
        inputs = family.input_weights(state)
        self.stems = set(map(_block_name, inputs))
        self.image_channels = image_channels
        self.order = self._channel_order(inputs)
        units: dict[str, list[str]] = {}
        for key in self.own:
            units.setdefault(_block_name(key), []).append(key)
        # Name in the target -> name in the source
        self.sources: dict[str, str] = {}
        self.adapted: set[str] = set()
        self.without_norm: set[str] = set()
        for unit, keys in units.items():
            without_norm = self._without_norm(keys)
            taken = without_norm or keys
            # A weight has several names, of which dropout changes all but the first.
            first = {key: self.first_names[key] for key in taken}
            if all(self._fits(key) for key in first.values()):
                self.sources |= {key: self.source_of(name) for key, name in first.items()}
                self.without_norm |= set(without_norm)
                if unit in self.stems:
                    self.adapted |= {key for key in taken if self._is_adapted(key)}

    def source_of(self, key: str) -> str:
        """Return the name in the source of the target's weight ``key``. The source need not have this weight."""
        own = self.family.stage_of(key)
        if own is None:
            return key
        part, stage = self.source_stage(*own)
        return f"{part}.{stage}{key.removeprefix('{}.{}'.format(*own))}"

    def source_stage(self, part: str, stage: int) -> tuple[str, int]:
        """Return the part and the number of the source's stage for a stage of the target."""
        if part == self.family.encoder_stages:
            return part, stage + self.offset
        # decoder stages count from the bottleneck: s belongs to encoder stage depth - 2 - s
        source_depth, depth = self.depths
        return part, source_depth - depth + stage - self.offset

    def _without_norm(self, keys: list[str]) -> list[str]:
        """Return the names of a convolution whose norm the source network lacks; none if the source has the norm."""
        convolution = [key for key in keys if re.search(r"\.(conv|all_modules\.0)\.", key)]
        has_norm = any(self.source_of(key) in self.source for key in keys if key not in convolution)
        return convolution if len(convolution) < len(keys) and not has_norm else []

    def _fits(self, key: str) -> bool:
        if self.family.part_of(key) is None:
            return False
        source, ours = self.source.get(self.source_of(key)), self.state[key]
        # Only these convolutions take images, and all others take features.
        is_stem, takes_stem = _block_name(key) in self.stems, _block_name(self.source_of(key)) in self.stems
        if source is None or is_stem != takes_stem:
            return False
        if is_stem and source.ndim == ours.ndim > 2:
            return _without_inputs(source) == _without_inputs(ours)
        return source.shape == ours.shape

    def _is_adapted(self, key: str) -> bool:
        ours = self.state[key]
        if ours.ndim <= 2:
            return False
        source = self.source[key]
        return not source.shape[1] == ours.shape[1] == self._images(ours) or self.order is not None

    def weights(self) -> dict[str, Tensor]:
        """Return the weights under all names that the target's state dict has for them."""
        weights = {key: self.source[source] for key, source in self.sources.items()}
        weights |= {key: self._fit_stem(key) for key in self.adapted}
        return {key: weights[first] for key, first in self.first_names.items() if first in weights} | weights

    def _fit_stem(self, key: str) -> Tensor:
        source, ours = self.source[key], self.state[key]
        images = self._images(ours)
        fitted = ours.detach().clone()
        if self.order is not None:
            source = source[:, self.order]
        fitted[:, :images] = (source if images == source.shape[1] else fit_input_channels(source, images)).to(ours)
        return fitted

    def _channel_order(self, inputs: list[str]) -> list[int] | None:
        """Return the source's channel for each image channel of the target, if only their order differs."""
        there, here = map(list, self.channel_names)
        kernels = [(self.source[name], self.state[name]) for name in inputs if name in self.source]
        if not kernels or there == here or sorted(there) != sorted(here) or len(set(here)) < len(here):
            return None
        fits = all(len(here) == source.shape[1] == self._images(ours) for source, ours in kernels)
        return [there.index(name) for name in here] if fits else None

    def _images(self, stem: Tensor) -> int:
        return stem.shape[1] if self.image_channels is None else min(self.image_channels, stem.shape[1])

    # --- the table -----------------------------------------------------------------------------------------------------

    def rows(self) -> list[TransferRow]:
        """Return a row for each part of the target."""
        parts: dict[str, list[str]] = {}
        for key in self.own:
            name = self.family.stage_of(key) or key.split(".")[:2]
            parts.setdefault(".".join(map(str, name)), []).append(key)
        return [self._row(part, keys) for part, keys in parts.items()]

    def _row(self, part: str, keys: list[str]) -> TransferRow:
        taken = [key for key in keys if key in self.sources]
        how = ADAPTED if (self.adapted | self.without_norm) & set(taken) else AS_IT_IS if taken else NOT_TAKEN
        notes = self._names_notes(taken)
        notes += [note for key in sorted(self.adapted & set(taken))[:1] if (note := self._channels_note(key))]
        stage = self.family.stage_of(keys[0])
        if taken and stage:
            notes += self._stage_notes(stage, has_norm=not set(taken) <= self.without_norm)
        if len(taken) < len(keys):
            notes.append(self._why_not(part, [key for key in keys if key not in self.sources]))
        is_encoder = self.family.part_of(keys[0]) == "encoder"
        return TransferRow(part, is_encoder, len(taken), len(keys), how, "; ".join(notes))

    def _names_notes(self, taken: list[str]) -> list[str]:
        """Return a note on a convolution of the images if the source's channels have other names or another order."""
        there, here = map(list, self.channel_names)
        if there == here or not there or not any(_block_name(key) in self.stems for key in taken):
            return []
        names = f"channels {', '.join(there)} there, {', '.join(here)} here"
        return [f"{names}: {'put in this order' if self.order else 'matched by their numbers'}"]

    def _channels_note(self, key: str) -> str:
        theirs, ours = self.source[key].shape[1], self.state[key].shape[1]
        images = self._images(self.state[key])
        notes = []
        if theirs != images:
            notes.append(
                f"{theirs} image channels there, {images} here: input weights repeated or added, their sum kept"
            )
        if images != ours:
            notes.append(f"{ours - images} further input channels keep their initial weights")
        return "; ".join(notes)

    def _stage_notes(self, stage: tuple[str, int], *, has_norm: bool) -> list[str]:
        theirs = self.source_stage(*stage)
        notes = [] if theirs == stage else ["from {}.{}".format(*theirs)]
        return notes + self.family.stage_differences(*self.architectures, (theirs, stage), has_norm=has_norm)

    def _why_not(self, part: str, left: list[str]) -> str:
        if self.family.part_of(left[0]) is None:
            return _ANYWAY
        if stage := self.family.stage_of(left[0]):
            name, theirs = self.source_stage(*stage)
            stages = self.depths[0] if name == self.family.encoder_stages else self.depths[0] - 1
            if not 0 <= theirs < stages:
                return "no such stage there"
            part = f"{name}.{theirs}"
        if not any(key.startswith(f"{part}.") for key in self.source):
            is_elsewhere = any(key.startswith(f"{part}.") for key in self.elsewhere)
            return "pre-trained, but not in this file: give the run's folder" if is_elsewhere else "not pre-trained"
        if {_block_name(key) for key in left} <= {_block_name(key) for key in self.without_norm}:
            return "no norm there: the norms here keep their initial values"
        absent = [key for key in left if self.source_of(key) not in self.source]
        unequal = [key for key in left if not self._fits(key) and key not in absent]
        if not unequal:
            return f"{self.source_of(absent[0])} is not there"
        ours, source = unequal[0], self.source_of(unequal[0])
        here = "" if ours == source else f"{ours} is "
        return f"{source} is {list(self.source[source].shape)} there, {here}{list(self.state[ours].shape)} here"


def stem_kernels(family: type[PretrainableNetwork], weights: Mapping[str, Tensor]) -> list[str]:
    """Return all names of the kernels that take images and, in a cascade's second stage, segmentations."""
    stems = set(map(_block_name, family.input_weights(weights)))
    return [key for key, weight in weights.items() if _block_name(key) in stems and weight.ndim > 2]


def _block_name(key: str) -> str:
    """Return the name of the block that holds a weight: a convolution with its bias and norm, or another module."""
    unit, *inside = re.split(r"\.(?:conv|norm|all_modules)\.", key)
    return unit if inside else key.rpartition(".")[0]


def _depth(family: type[PretrainableNetwork], weights: Iterable[str]) -> int:
    """Return the number of encoder stages that have weights."""
    stages = filter(None, map(family.stage_of, weights))
    return max((number + 1 for part, number in stages if part == family.encoder_stages), default=0)


def _parameters(state: dict[str, Tensor], keys: Iterable[str]) -> int:
    # Count the tensors of a convolution once, although they have two names.
    return sum(state[key].numel() for key in keys if ".all_modules." not in key)


def _without_inputs(weight: Tensor) -> tuple[int, ...]:
    return (weight.shape[0], *weight.shape[2:])
