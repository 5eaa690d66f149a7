"""SMIT: restoration of masked voxels, and self-distillation of patch tokens and image tokens from an averaged teacher.

The student sees two masked views, and the teacher sees both views without masks. The student restores the masked voxels. It also
predicts the teacher's output for the masked locations, and the teacher's output for the other view.

Source: Jiang et al., MICCAI 2022, https://arxiv.org/abs/2205.10342, with the values of the authors' code,
https://github.com/The-Veeraraghavan-Lab/SMIT; Zhou et al., iBOT, ICLR 2022, https://arxiv.org/abs/2111.07832, Eq. 2 and 3; Caron
et al., DINO, ICCV 2021, https://arxiv.org/abs/2104.14294, Algorithm 1.

Departures: patch tokens are locations of a map of the encoder, and the image token is the mean of its deepest map. Tokens are
standardised over the batch before the heads, because instance norm gives all images nearly the same mean. Sinkhorn and Knopp's
algorithm spreads the teacher's image tokens over all outputs, as in DINOv2 (Oquab et al., TMLR 2024,
https://arxiv.org/abs/2304.07193, section 4), instead of a centre. The teacher's temperature stays at 0.04, and the published one
rises to 0.07. Restoration is that of the method `restoration`: a squared error, and the published one is absolute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nnunetv2_macl.losses import DistillationLoss, at_least_float32, sinkhorn
from nnunetv2_macl.methods.averaging import averaged_copy, encode_without_gradient, rising_decay, update_average
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom, Views
from nnunetv2_macl.methods.config import Count, Fraction, Positive
from nnunetv2_macl.methods.heads import DistillationHead, pool
from nnunetv2_macl.methods.restoration import MaskedViews, Restoration, RestorationConfig, restoration_loss
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import Crops, IntensityNumbers, RandomCrops, RandomIntensity

# Crops draw from a separate random stream, so that several methods can be trained together.
_CROPS = 8
_CROP_ZOOM = (1.0, 1.6)


class SMITConfig(RestorationConfig):
    """The recipe keys of SMIT."""

    weight_tokens: Positive = Field(0.1, description="weight of the self-distillation of patch tokens L_MPD")
    weight_image_token: Positive = Field(0.1, description="weight of the self-distillation of image tokens L_ITD")
    tokens: Count = Field(
        1024, description="number of compared patch tokens of each view in a batch; masked locations are chosen first"
    )
    token_dim: Annotated[int, Field(ge=2)] = Field(
        1024,
        description="number of outputs of the token heads; 8192 as published, for a data set of 600,000 images",
    )
    student_temperature: Positive = Field(0.1, description="τ of the student")
    teacher_temperature: Positive = Field(0.04, description="τ of the teacher; the published one rises to 0.07")
    teacher_decay: Fraction = Field(
        0.996,
        description="weight of the old average in the teacher at the first step; it rises to 1 along half a cosine",
    )
    intensity: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="strength of random gamma, contrast, brightness, bias field, noise and blur; `0` disables them"
    )


class _Numbers(NamedTuple):
    """Random numbers of a step, with one list item for each of the two views."""

    crops: list[Crops]
    masks: list[Tensor]
    tokens: list[Tensor]
    hidden: list[Tensor]
    intensity: list[IntensityNumbers]


class _SMITViews(Views):
    """Two crops of each patch, with and without a mask, and the locations whose tokens are compared.

    Names end with the index of the view: ``masked_0``, ``target_0`` and ``mask_0`` from `MaskedViews`; ``whole_0``, the crop
    without a mask; ``tokens_0``, (n, T), indices of locations; ``hidden_0``, (n, T), masked fraction of each location.
    """

    def __init__(self, masked: MaskedViews, grid: Sequence[int], geometry: Geometry, recipe: Any) -> None:
        self.masked, self.grid, self.tokens = masked, tuple(grid), recipe.tokens
        self.crops = RandomCrops(_CROP_ZOOM)
        self.intensity = RandomIntensity(recipe.intensity, geometry.channels_without_zscore)

    def draw(self, random: StepRandom) -> _Numbers:
        count = min(math.prod(self.grid), max(1, self.tokens // random.batch_size))
        numbers = _Numbers([], [], [], [], [])
        for view in range(2):
            generator = random.generator(_CROPS, view)
            crops = self.crops.draw(random.batch_size, len(random.patch_size), generator)
            order = torch.rand(random.batch_size, math.prod(self.grid), generator=generator)
            mask = self.masked.draw(random, view + 1)
            hidden = _share_at(mask, self.grid)
            # The most masked locations come first. Locations with the same masked fraction are in random order.
            tokens = (hidden + 1e-3 * order[random.part]).topk(count).indices
            numbers.crops.append(Crops(crops.centres[random.part], crops.reaches[random.part]))
            numbers.masks.append(mask)
            numbers.tokens.append(tokens)
            numbers.hidden.append(hidden.gather(1, tokens))
            if self.intensity.strength:
                generator = random.generator(_CROPS, view + 3)
                numbers.intensity.append(random.draw_intensity(self.intensity, generator))
        return numbers

    def make(self, patches: Tensor, numbers: _Numbers, progress: Progress) -> dict[str, Tensor]:
        shown: dict[str, Tensor] = {}
        for view, crops in enumerate(numbers.crops):
            whole = self.crops.apply(patches, crops)
            if numbers.intensity:
                whole = self.intensity.apply(whole, numbers.intensity[view])
            found = self.masked.make(whole, numbers.masks[view], progress) | {"whole": whole}
            found |= {"tokens": numbers.tokens[view], "hidden": numbers.hidden[view].to(patches)}
            shown |= {f"{name}_{view}": values for name, values in found.items()}
        return shown


def _share_at(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Return the masked fraction of each location of a grid, (N, locations), from a mask (N, 1, *cells)."""
    pooling = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(grid)]
    return pooling(mask.float(), tuple(grid)).flatten(1)  # type: ignore[arg-type]


def _vectors_at(maps: Tensor, tokens: Tensor) -> Tensor:
    """Return the vectors of maps (N, C, *grid) at locations (N, T): (N, T, C), in at least float32."""
    vectors = maps.flatten(2).transpose(1, 2)
    vectors = vectors.gather(1, tokens[..., None].expand(-1, -1, vectors.shape[-1]))
    return at_least_float32(vectors)


class SMIT(Restoration):
    """Restores masked voxels, and learns from an averaged teacher that sees all voxels."""

    name = "smit"
    Config = SMITConfig
    loss_labels = {
        "restoration": "L_R, restoration",
        "tokens": "L_MPD, patch tokens",
        "image_token": "L_ITD, image token",
    }
    view_titles = {"target_0": "restoration target", "masked_0": "student", "whole_1": "teacher: other view"}
    reference_labels = {"uniform": "image token: all images have equal outputs"}
    referenced_losses = ("image_token",)
    couples_samples = True
    summary = "by SMIT, restoration of masked voxels and self-distillation,"
    citations = (
        "Jiang et al. Self-supervised 3D anatomy segmentation using self-distilled masked image transformer "
        "(SMIT). MICCAI 2022. arXiv:2205.10342",
    )
    tag = "masked-image-modelling"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        level = network.encoder_levels[geometry.auxiliary_stage - 1]
        channels = level.channels, network.encoder_levels[-1].channels
        self.token_head, self.image_head = (DistillationHead(c, recipe.token_dim, hidden=c) for c in channels)
        self.teacher = averaged_copy(network.encoder)
        self.teacher_token_head, self.teacher_image_head = map(averaged_copy, (self.token_head, self.image_head))
        self.token_loss = DistillationLoss(recipe.token_dim, recipe.student_temperature)
        grid = [n // s for n, s in zip(geometry.patch_size, level.stride, strict=True)]
        self.views = _SMITViews(self.masked_views, grid, geometry, recipe)

    @classmethod
    def weights(cls, recipe: Any) -> dict[str, float]:
        return {name: getattr(recipe, f"weight_{name}") for name in cls.loss_labels}

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        def both(name: str) -> Tensor:
            return torch.cat((views[f"{name}_0"], views[f"{name}_1"]))

        maps = self.network.encode(both("masked"))
        restored = self.restoration_head(self.network.decode(maps)[-1])
        dense, image = self._read(maps)
        teacher_dense, teacher_image = encode_without_gradient(
            lambda part: self._read(self.network.encode(part, self.teacher)),
            both("whole"),
            whole=self.network.mixes_samples,
        )
        found = {
            "restoration": restoration_loss(restored, both("target"), both("mask")),
            "hidden": both("hidden"),
            "student_tokens": _vectors_at(dense, both("tokens")),
            "student_image": image,
            "teacher_tokens": _vectors_at(teacher_dense, both("tokens")),
            "teacher_image": teacher_image,
        }
        # Each row is a patch with its two views, because the loss of a patch needs both.
        return {name: torch.stack(values.chunk(2), 1) for name, values in found.items()}

    def _read(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the map whose locations are patch tokens, and the mean of the deepest map, which is the image token."""
        return maps[self.geometry.auxiliary_stage - 1], pool(maps[-1])

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        def logits(head: nn.Module, name: str) -> Tensor:
            vectors = features[name]
            return head(vectors.flatten(0, -2)).view(*vectors.shape[:-1], -1)

        return {
            "restoration": features["restoration"],
            "hidden": features["hidden"],
            "student_tokens": logits(self.token_head, "student_tokens"),
            "student_image": logits(self.image_head, "student_image"),
            "teacher_tokens": logits(self.teacher_token_head, "teacher_tokens"),
            "teacher_image": logits(self.teacher_image_head, "teacher_image"),
        }

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the losses: restoration, masked patch tokens, and image tokens of the other view."""
        temperature, hidden = self.recipe.teacher_temperature, embeddings["hidden"]
        targets = self.token_loss.targets(embeddings["teacher_tokens"], temperature)
        tokens = self.token_loss(embeddings["student_tokens"], targets)
        # A running centre adapts too slowly with the few images of a batch: all outputs became equal. Sinkhorn's targets use all
        # outputs equally, so a student that cannot tell images apart has the loss ln K.
        teacher = embeddings["teacher_image"]
        targets = sinkhorn(teacher.detach().flatten(0, 1), temperature).view_as(teacher).flip(1)
        losses = {
            "restoration": embeddings["restoration"].mean(),
            "tokens": ((tokens * hidden).sum(-1) / hidden.sum(-1)).mean(),
            "image_token": self.token_loss(embeddings["student_image"], targets).mean(),
        }
        weights = self.weights(self.recipe)
        return losses | {"total": torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()}

    def copy_network(self) -> None:
        self.teacher.load_state_dict(self.network.encoder.state_dict())

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Update the teacher and the centre of the patch tokens."""
        decay = rising_decay(self.recipe.teacher_decay, progress)
        update_average(self.teacher, self.network.encoder, decay)
        update_average(self.teacher_token_head, self.token_head, decay)
        update_average(self.teacher_image_head, self.image_head, decay)
        self.token_loss.update_centre(embeddings["teacher_tokens"])

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the student's image tokens of the two views."""
        first, second = embeddings["student_image"].unbind(1)
        return first, second

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        return {"uniform": math.log(recipe.token_dim)}

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [
            f"a smaller teacher_temperature (now {recipe.teacher_temperature:g})",
            f"a smaller weight_image_token (now {recipe.weight_image_token:g})",
        ]
