"""MACL: multi-level asymmetric contrastive learning.

Two branches see each patch. The dominant branch, encoder and partial decoder, sees the downsampled patch. The auxiliary branch,
only the encoder, sees the patch at full size. The losses compare the branches on the image level, at each location of a dense
map, and in their features.

Source: Zeng et al., IEEE JBHI 2026, https://arxiv.org/abs/2309.11876, Figure 2 and Eq. 2-10.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nnunetv2_macl.checkpoints import MACL_CITATION
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.losses import MultiLevelContrastiveLoss, downsample
from nnunetv2_macl.methods.averaging import averaged_copy, encode_without_gradient, update_average
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom, Views
from nnunetv2_macl.methods.branches import plan_branches
from nnunetv2_macl.methods.config import BranchKeys, Fraction, NotNegative, Positive, SpatialViewKeys
from nnunetv2_macl.methods.contrast import ContrastiveMethod, spatial_views
from nnunetv2_macl.methods.heads import DenseProjectionHead, GlobalProjectionHead
from nnunetv2_macl.methods.statistics import feature_statistics
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import IntensityNumbers, RandomAffine, RandomIntensity

GROUPS = ("invariance_small", "invariance", "variance_small", "variance")
_INTENSITY_GROUPS = {"all": GROUPS, "variance": GROUPS[2:], "auxiliary": GROUPS[1::2]}


class MACLConfig(BranchKeys, SpatialViewKeys):
    """The recipe keys of MACL."""

    weight_global: NotNegative = Field(1.0, description="λ1, weight of the image-level loss L_g")
    weight_dense: NotNegative = Field(0.5, description="λ2, weight of the pixel-level loss L_d")
    dense_negatives: Literal["location", "image", "both"] = Field(
        "location",
        description="negatives of a location in L_d: the same location of other images, as in the paper; other locations of the "
        "same image; or both, with half of the weight each",
    )
    weight_equivariance: NotNegative = Field(1.0, description="λ3, weight of the feature-level loss L_ER")
    equivariance_form: Literal["l1", "standardised"] = Field(
        "l1",
        description="`l1`: the paper's form; `standardised`: computed on maps standardised over the batch, which removes the "
        "trivial solution of identical maps for every image",
    )
    temperature: Positive = Field(0.1, description="τ")
    base_temperature: Positive | None = Field(
        0.07, description="L_g and L_d are multiplied by τ / `base_temperature`; `null` disables this factor"
    )
    threshold: Fraction = Field(
        0.1, description="t: two patches are positives if their relative positions differ by less than t on every axis"
    )
    threshold_warmup: Fraction = Field(0.0, description="fraction of the steps over which t rises from 0")
    own_view_weight: Fraction = Field(
        0.0, description="a in a · (other view of the same patch) + (1 - a) · (mean over all positives)"
    )
    limit_positives: bool = Field(
        True,
        description="whether to lower t until an anchor has at most about N/8 positives besides its own other view",
    )
    auxiliary_encoder: Literal["shared", "ema", "independent"] = Field(
        "shared",
        description="encoder of the auxiliary branch: the trained encoder, its average, or a second trained encoder",
    )
    ema_decay: Fraction = Field(0.999, description="weight of the old average in the averaged auxiliary encoder")
    standardise_projector: bool = Field(
        True, description="whether to standardise pooled features over the batch before the projection head"
    )
    embedding_dim: Annotated[int, Field(ge=2)] = Field(128, description="length of the image-level vectors")
    training_stages: Literal[1, 2] = Field(
        1,
        description="`1`: all losses are trained together; `2`: all but L_d are trained for half of the steps, then only L_d "
        "with the encoder frozen",
    )
    downsample_first_stage: bool = Field(
        True,
        description="with two training stages: `false` gives the dominant branch full-size views in the first stage, which "
        "disables L_ER there",
    )
    intensity: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="strength of random gamma, contrast, brightness, bias field, noise and blur; `0` disables them"
    )
    intensity_on: Literal["all", "variance", "auxiliary"] = Field(
        "all",
        description="views with intensity changes: all, those of the variance group, or those of the auxiliary branch",
    )

    @model_validator(mode="after")
    def _compares_something(self) -> MACLConfig:
        if self.weight_global + self.weight_dense <= 0:
            raise ValueError(
                "weight_global and weight_dense are both 0, so the losses are minimal if all images have the same features. "
                "Set one of them above 0, or leave out the method macl"
            )
        return self


def _all_weights(recipe: Any) -> dict[str, float]:
    """Return the weight of each loss, in the order of their sum."""
    share = {"location": 1.0, "both": 0.5, "image": 0.0}[recipe.dense_negatives]
    return {
        "global": recipe.weight_global,
        "dense": share * recipe.weight_dense,
        "locations": (1 - share) * recipe.weight_dense,
        "equivariance": recipe.weight_equivariance,
    }


class _Numbers(NamedTuple):
    """Random numbers of a step: the parameters of the two spatial views and of the intensity views of each group."""

    spatial: Tensor | None
    intensity: dict[str, IntensityNumbers]


class _MACLViews(Views):
    """The views of a patch, in two groups.

    The invariance group has the patch itself, downsampled and at full size: down(I1) and I2. The variance group has two random
    spatial transforms of it: down(V1) and V2.
    """

    def __init__(self, geometry: Geometry, recipe: Any) -> None:
        self.small, self.patch_size = geometry.dominant_patch_size, geometry.patch_size
        self.spatial: RandomAffine | None = None
        if recipe.weight_global:
            self.spatial = spatial_views(geometry, recipe)
        self.has_invariance = bool(recipe.weight_dense or recipe.weight_equivariance)
        shown = (GROUPS[:2] if self.has_invariance else ()) + (GROUPS[2:] if self.spatial else ())
        self.intensity = RandomIntensity(recipe.intensity, geometry.channels_without_zscore)
        changed = _INTENSITY_GROUPS[recipe.intensity_on] if recipe.intensity else ()
        self.changed = [group for group in shown if group in changed]
        self.full_size_first = MACL.trains_in_stages(recipe) and not recipe.downsample_first_stage

    def draw(self, random: StepRandom) -> _Numbers:
        spatial = None
        if self.spatial is not None:
            generator = random.generator()
            both = [self.spatial.draw(random.batch_size, generator)[random.part] for _ in range(2)]
            spatial = torch.stack(both)
        intensity = {
            group: random.draw_intensity(self.intensity, random.generator(GROUPS.index(group) + 1))
            for group in self.changed
        }
        return _Numbers(spatial, intensity)

    def make(self, patches: Tensor, numbers: _Numbers, progress: Progress) -> dict[str, Tensor]:
        """Return the views that the losses need, of down(I1), I2, down(V1) and V2.

        V1 keeps its size in a first training stage without downsampling.
        """
        shown: dict[str, Tensor] = {}
        if self.has_invariance:
            shown |= {"invariance_small": downsample(patches, self.small), "invariance": patches}
        if self.spatial is not None and numbers.spatial is not None:
            first, second = numbers.spatial
            at_full_size = self.full_size_first and not progress.is_second_half
            shown["variance_small"] = self.spatial.apply(
                patches, first, self.patch_size if at_full_size else self.small
            )
            shown["variance"] = self.spatial.apply(patches, second)
        return shown | {
            group: self.intensity.apply(shown[group], changes) for group, changes in numbers.intensity.items()
        }


class MACL(ContrastiveMethod):
    """Contrasts images and locations between two branches, and makes features equivariant to downsampling.

    A loss of weight 0 is not computed, and its modules are not built. Embeddings are ``global_dominant`` and
    ``global_auxiliary``, (N, embedding_dim), of the variance group; ``dense_dominant`` and ``dense_auxiliary``,
    (N, channels, *grid), and ``bottleneck_dominant`` and ``bottleneck_auxiliary``, (N, channels, *bottleneck), of the
    invariance group.

    Raises:
        ValueError: The auxiliary stage is shallower than the dominant map or outside the network.
    """

    name = "macl"
    Config = MACLConfig
    loss_labels = {
        "global": "L_g, image level",
        "dense": "L_d, pixel level",
        "locations": "L_i, within an image",
        "equivariance": "L_ER, feature level",
    }
    view_titles = {
        "invariance_small": "dominant: down(I1)",
        "invariance": "auxiliary: I2",
        "variance_small": "dominant: down(V1)",
        "variance": "auxiliary: V2",
    }
    referenced_losses = ("global", "dense")
    compares_positions = True
    has_two_branches = True
    plan_keys = ("dominant_patch_size", "grid", "threshold", "expected_positives", "out_of_plane_rotation")
    summary = "by MACL, multi-level contrastive learning,"
    citations = (MACL_CITATION,)

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        stages, stage = len(network.encoder_levels), geometry.auxiliary_stage
        if not stages - geometry.decoder_stages <= stage <= stages:
            raise ValueError(
                f"auxiliary_stage must be between {stages - geometry.decoder_stages} and {stages}, got {stage}"
            )
        self.mixes_views = network.mixes_samples
        self.auxiliary_encoder = None
        if recipe.auxiliary_encoder == "ema":
            self.auxiliary_encoder = averaged_copy(network.encoder)
        elif recipe.auxiliary_encoder == "independent":
            self.auxiliary_encoder = deepcopy(network.encoder)
        dominant = [network.encoder_levels[-1], *network.decoder_levels][-1].channels
        if recipe.weight_global:
            settings = {"embedding_dim": recipe.embedding_dim, "batch_norm": recipe.standardise_projector}
            self.instance_projector_dominant = GlobalProjectionHead(dominant, **settings)
            self.instance_projector_auxiliary = GlobalProjectionHead(network.encoder_levels[-1].channels, **settings)
        if recipe.weight_dense:
            channels = network.encoder_levels[stage - 1].channels
            self.pixel_projector = DenseProjectionHead(channels, dominant, len(geometry.patch_size))
        self.loss = MultiLevelContrastiveLoss(
            **{f"weight_{name}": weight for name, weight in _all_weights(recipe).items()},
            threshold=geometry.threshold,
            **self.loss_settings(recipe),
            equivariance_form=recipe.equivariance_form,
        )
        self.views = _MACLViews(geometry, recipe)

    @classmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        """Return the stages and sizes of both branches.

        Raises:
            UserError: The recipe trains no decoder stage in two training stages, or its stages do not fit the network.
        """
        if cls.trains_in_stages(recipe) and recipe.decoder_stages == 0:
            raise UserError(
                "decoder_stages is 0, and the second of two training stages trains the decoder alone. Set decoder_stages to at "
                "least 1, or training_stages to 1."
            )
        return plan_branches(patch_size, strides, recipe)

    @classmethod
    def weights(cls, recipe: Any) -> dict[str, float]:
        return {name: weight for name, weight in _all_weights(recipe).items() if weight}

    @classmethod
    def trains_in_stages(cls, recipe: Any) -> bool:
        # The first stage trains the image level, and the second one the pixel level.
        return bool(recipe.training_stages == 2 and recipe.weight_global and recipe.weight_dense)

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        small = [views[group] for group in GROUPS[::2] if group in views]
        full = [views[group] for group in GROUPS[1::2] if group in views]
        patches = len(full[0])
        dominant = [self.network.decode(self.network.encode(part)) for part in self._passes(small)]
        auxiliary = [self._auxiliary(part) for part in self._passes(full)]

        features: dict[str, Tensor] = {}
        if self.recipe.weight_global:
            features["variance_dominant"] = dominant[-1][-1][-patches:]
            features["variance_auxiliary"] = auxiliary[-1][-1][-patches:]
        if self.recipe.weight_dense:
            features["dense_dominant"] = dominant[0][-1][:patches]
            features["dense_auxiliary"] = auxiliary[0][0][:patches]
        if self.recipe.weight_equivariance:
            features["bottleneck_dominant"] = dominant[0][0][:patches]
            features["bottleneck_auxiliary"] = auxiliary[0][-1][:patches]
        return features

    def _passes(self, groups: list[Tensor]) -> list[Tensor]:
        """Return the groups of views as one, because one pass is faster, unless their sizes differ.

        With batch norm or dropout, each group has a pass of its own, as in the published implementation.
        """
        is_one = len({group.shape for group in groups}) == 1 and not self.mixes_views
        return [torch.cat(groups)] if is_one else groups

    @property
    def shown_sizes(self) -> list[Sequence[int]]:
        return [self.geometry.patch_size, self.geometry.dominant_patch_size]

    def _auxiliary(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the dense map and the deepest map of the auxiliary branch."""

        def encode(part: Tensor) -> tuple[Tensor, Tensor]:
            maps = self.network.encode(part, self.auxiliary_encoder)
            return maps[self.geometry.auxiliary_stage - 1], maps[-1]

        if self.recipe.auxiliary_encoder == "ema":
            return encode_without_gradient(encode, images, whole=self.network.mixes_samples)
        return encode(images)

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        if self.recipe.weight_global:
            outputs["global_dominant"] = self.instance_projector_dominant(features["variance_dominant"])
            outputs["global_auxiliary"] = self.instance_projector_auxiliary(features["variance_auxiliary"])
        if self.recipe.weight_dense:
            outputs["dense_dominant"] = features["dense_dominant"]
            outputs["dense_auxiliary"] = self.pixel_projector(features["dense_auxiliary"])
        if self.recipe.weight_equivariance:
            outputs["bottleneck_dominant"] = features["bottleneck_dominant"]
            outputs["bottleneck_auxiliary"] = features["bottleneck_auxiliary"]
        return outputs

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the losses that the current training stage trains, by name, and their weighted sum ``total``."""
        warmup = self.recipe.threshold_warmup * progress.steps
        self.loss.threshold = self.geometry.threshold * min(1.0, progress.step / warmup if warmup else 1.0)
        losses: dict[str, Tensor] = self.loss(embeddings, positions)
        if self.trains_in_stages(self.recipe):
            if progress.is_second_half:
                trained = ["dense", "locations"]
            else:
                # L_ER compares two sizes of an image, and without downsampling there is only one.
                trained = ["global", "equivariance"] if self.recipe.downsample_first_stage else ["global"]
            losses = {name: losses[name] for name in trained if name in losses}
            losses["total"] = torch.as_tensor(sum(loss * self.loss.weights[name] for name, loss in losses.items()))
        return losses

    def copy_network(self) -> None:
        """Copy the weights of the encoder into the auxiliary encoder, if there is one."""
        if self.auxiliary_encoder is not None:
            self.auxiliary_encoder.load_state_dict(self.network.encoder.state_dict())

    def withhold_gradients(self, progress: Progress) -> None:
        """Freeze the encoder in the second of two training stages."""
        if self.trains_in_stages(self.recipe) and progress.is_second_half:
            for encoder in (self.network.encoder, self.auxiliary_encoder):
                for parameter in encoder.parameters() if encoder is not None else ():
                    parameter.grad = None

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Update the averaged encoder."""
        if self.recipe.auxiliary_encoder == "ema" and self.auxiliary_encoder is not None:
            update_average(self.auxiliary_encoder, self.network.encoder, self.recipe.ema_decay)

    def measure(self, embeddings: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Return the mean number of positives of an anchor, and the RMS and the variance between images of the bottleneck."""
        found = super().measure(embeddings, positions)
        if "bottleneck_dominant" in embeddings:
            rms, between = feature_statistics(embeddings["bottleneck_dominant"])
            found |= {"bottleneck_rms": rms, "bottleneck_variance": between}
        return found

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the image-level vectors; without an image level, the vectors of the dense maps at the middle location."""
        if "global_dominant" in embeddings:
            return embeddings["global_dominant"], embeddings["global_auxiliary"]
        # The mean over locations is nearly the same for every image, because of instance norm.
        dominant, auxiliary = (embeddings[name].flatten(2) for name in ("dense_dominant", "dense_auxiliary"))
        middle = dominant.shape[2] // 2
        return dominant[..., middle], auxiliary[..., middle]

    @classmethod
    def statistics(cls, recipe: Any) -> list[str]:
        return super().statistics(recipe) + ["bottleneck_rms", "bottleneck_variance"] * (recipe.weight_equivariance > 0)

    @classmethod
    def loss_settings(cls, recipe: Any) -> dict[str, Any]:
        return {key: getattr(recipe, key) for key in ("temperature", "base_temperature", "own_view_weight")}

    def threshold(self) -> float:
        return self.loss.threshold

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        tries = []
        if not recipe.standardise_projector:
            tries.append("standardise_projector=true")
        if recipe.own_view_weight < 0.5:
            tries.append(f"own_view_weight=0.5 (now {recipe.own_view_weight:g})")
        if not recipe.limit_positives:
            tries.append("limit_positives=true")
        if recipe.threshold > 0:
            tries.append(f"a smaller threshold (now {recipe.threshold:g}), or threshold_warmup=0.2")
        if recipe.weight_equivariance > 0:
            tries.append(f"a smaller weight_equivariance (now {recipe.weight_equivariance:g})")
        return tries
