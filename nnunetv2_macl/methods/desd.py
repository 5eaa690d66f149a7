"""DeSD: maps at several depths of the network predict an averaged teacher's output for another view at its last map.

Source: Ye et al., "DeSD: Self-Supervised Learning with Deep Self-Distillation for 3D Medical Image Segmentation", MICCAI 2022,
and DINO, Caron et al., ICCV 2021, https://arxiv.org/abs/2104.14294. Departures: 4,096 outputs instead of 60,000, because the
published heads would have more weights than the network (the authors of MACL seem to have used 512). Pooled features are
standardised over the batch before the heads. The trained network is exported; the authors publish the teacher, its average.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from nnunetv2_macl.losses import DistillationLoss
from nnunetv2_macl.methods.averaging import averaged_copy, encode_without_gradient, rising_decay, update_average
from nnunetv2_macl.methods.base import Geometry, Progress
from nnunetv2_macl.methods.config import Count, Fraction, ImageViewKeys, Positive
from nnunetv2_macl.methods.heads import DistillationHead, pool
from nnunetv2_macl.methods.image_level import ImageLevelMethod
from nnunetv2_macl.networks.base import PretrainableNetwork

_FIRST_TEACHER_TEMPERATURE = 0.04


class DeSDConfig(ImageViewKeys):
    """The recipe keys of DeSD."""

    depths: Count = Field(4, description="number of last maps that predict the teacher; fewer if the network has fewer")
    outputs: Annotated[int, Field(ge=2)] = Field(4096, description="K, length of the compared vectors")
    hidden: Count = Field(2048, description="length of the hidden vectors of the heads")
    temperature: Positive = Field(0.1, description="τ of the student")
    teacher_temperature: Positive = Field(0.07, description="τ of the teacher, after a linear rise from 0.04")
    teacher_warmup: Fraction = Field(
        0.07, description="fraction of the steps over which the teacher's temperature rises"
    )
    momentum_decay: Fraction = Field(
        0.996,
        description="weight of the old average in the teacher at the first step; it rises to 1 along half a cosine",
    )
    centre_momentum: Fraction = Field(0.9, description="weight of the old mean in the centre of the teacher's outputs")
    frozen_output_epochs: Annotated[int, Field(ge=0)] = Field(
        1,
        description="number of initial epochs in which the last layers of the student's heads are frozen, at most half of the "
        "run",
    )


class DeSD(ImageLevelMethod):
    """Distils the output of an averaged teacher into several depths of the network.

    The teacher averages the network and its last head. The depths are the last maps of the encoder and of the trained decoder
    stages. Embeddings, all (N, outputs): the student's outputs for both views at each depth, ``first_0``, ``second_0`` and so on,
    the last map last, and the teacher's outputs, ``first_target`` and ``second_target``.
    """

    name = "desd"
    Config = DeSDConfig
    loss_labels = {"distillation": "L_D, all depths"}
    reference_labels = {"output_collapse": "collapse: all outputs alike"}
    referenced_losses = ("distillation",)
    summary = "by DeSD, self-distillation at several depths,"
    citations = (
        "Ye et al. DeSD: Self-Supervised Learning with Deep Self-Distillation for 3D Medical Image Segmentation. MICCAI 2022",
    )
    tag = "self-distillation"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        levels = [*network.encoder_levels, *network.decoder_levels][-recipe.depths :]
        self.heads = nn.ModuleList(
            DistillationHead(level.channels, recipe.outputs, hidden=recipe.hidden) for level in levels
        )
        self.teacher_network = averaged_copy(network)
        self.teacher_head = averaged_copy(self.heads[-1])
        self.loss = DistillationLoss(recipe.outputs, recipe.temperature, recipe.centre_momentum)

    @classmethod
    def trains_in_stages(cls, recipe: Any) -> bool:
        return recipe.frozen_output_epochs > 0

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        both = torch.cat((views["first"], views["second"]))
        (targets,) = encode_without_gradient(
            lambda part: (pool(self.last_map(self.teacher_network, part)),), both, whole=self.network.mixes_samples
        )
        encoded = self.network.encode(both)
        maps = [*encoded, *self.network.decode(encoded)[1:]][-len(self.heads) :]
        features = {str(depth): pool(values) for depth, values in enumerate(maps)} | {"target": targets}
        return _by_view(features)

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        def of(name: str) -> Tensor:
            return torch.cat((features[f"first_{name}"], features[f"second_{name}"]))

        outputs = {str(depth): head(of(str(depth))) for depth, head in enumerate(self.heads)}
        return _by_view(outputs | {"target": self.teacher_head(of("target").detach())})

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        temperature = self.teacher_temperature(progress)
        losses = []
        for student, teacher in (("first", "second"), ("second", "first")):
            targets = self.loss.targets(embeddings[f"{teacher}_target"], temperature)
            losses += [self.loss(embeddings[f"{student}_{depth}"], targets).mean() for depth in range(len(self.heads))]
        loss = torch.stack(losses).mean()
        return {"distillation": loss, "total": loss}

    def teacher_temperature(self, progress: Progress) -> float:
        """Return the temperature of the teacher at a step."""
        warmup = self.recipe.teacher_warmup * progress.steps
        done = min(1.0, progress.step / warmup) if warmup else 1.0
        return _FIRST_TEACHER_TEMPERATURE + done * (self.recipe.teacher_temperature - _FIRST_TEACHER_TEMPERATURE)

    def copy_network(self) -> None:
        self.teacher_network.load_state_dict(self.network.state_dict())

    def withhold_gradients(self, progress: Progress) -> None:
        """Freeze the last layers of the heads in the first epochs."""
        if progress.is_within(self.recipe.frozen_output_epochs):
            for head in self.heads:
                head.directions.weight.grad = None  # type: ignore[union-attr]

    def after_step(self, embeddings: dict[str, Tensor], progress: Progress) -> None:
        """Update the teacher and the centre of its outputs."""
        decay = rising_decay(self.recipe.momentum_decay, progress)
        update_average(self.teacher_network, self.network, decay)
        update_average(self.teacher_head, self.heads[-1], decay)
        self.loss.update_centre(torch.cat((embeddings["first_target"], embeddings["second_target"])))

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the outputs of the student's last head."""
        deepest = len(self.heads) - 1
        return embeddings[f"first_{deepest}"], embeddings[f"second_{deepest}"]

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        return {"output_collapse": log(recipe.outputs)}

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [
            f"a lower teacher_temperature (now {recipe.teacher_temperature:g})",
            f"fewer outputs (now {recipe.outputs})",
        ]


def _by_view(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split each tensor into the rows of the first and of the second view, and prefix the names with the view."""
    return {
        f"{view}_{name}": part
        for name, both in values.items()
        for view, part in zip(("first", "second"), both.chunk(2), strict=True)
    }
