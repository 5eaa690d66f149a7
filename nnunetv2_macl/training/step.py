"""One step of MACL: what the branches see, the losses, their gradients, the update of the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim.lr_scheduler import LambdaLR

from nnunetv2_macl import distributed, monitoring
from nnunetv2_macl.losses import MultiLevelContrastiveLoss
from nnunetv2_macl.network import MACLNetwork
from nnunetv2_macl.planning.memory import refuse_parts
from nnunetv2_macl.planning.plan import MACLPlan
from nnunetv2_macl.recipe import Recipe
from nnunetv2_macl.restoration import draw_mask, restoration_loss, standardise
from nnunetv2_macl.views import INTENSITY_ON, IntensityViews, SpatialViews, down

_MAX_GRADIENT_NORM = 12  # nnU-Net's own

Shown = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def learning_rate_share(recipe: Recipe, step: int) -> float:
    """Of the recipe's rate at a step: linear warm-up, then the schedule to 0."""
    steps = recipe.num_epochs * recipe.num_iterations_per_epoch
    warmup = round(recipe.learning_rate_warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "poly": (1 - done) ** 0.9, "constant": 1.0}[recipe.schedule]


class TrainingStep:
    """Takes a batch and the number of the step, and moves the weights by it.

    Every random number is a function of (seed, step), and each rank shows its share of what one process would.

    Args:
        network: the pre-training network, compiled or not.
        loss: of all levels.
        optimizer, scheduler: stepped once a step.
        grad_scaler: None without mixed precision in float16.
        plan: sizes, batch, threshold.
        device: where the network is.
        unnormalised: numbers of the channels whose mean nnU-Net leaves anywhere.

    Raises:
        UserError: the plan asks for parts of a batch, and the network mixes its patches.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: MultiLevelContrastiveLoss,
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR,
        grad_scaler: torch.amp.GradScaler | None,
        plan: MACLPlan,
        device: torch.device,
        unnormalised: Sequence[int] = (),
    ) -> None:
        self.network, self.loss = network, loss
        self.optimizer, self.scheduler, self.grad_scaler = optimizer, scheduler, grad_scaler
        self.plan, self.recipe, self.device = plan, plan.get_recipe(), device
        self.steps = self.recipe.num_epochs * self.recipe.num_iterations_per_epoch
        self.unnormalised = unnormalised
        self.first, self.last = distributed.share(plan.batch_size)
        refuse_parts(self.module, plan.patches_at_once, self.last - self.first)
        # what is called beside the network itself
        self._features, self._restored = self.module.features, self.module.restore
        if isinstance(network, OptimizedModule):
            # parts have two sizes at most, and code for any size is what compilers fail at
            self._features = torch.compile(self._features, dynamic=False)
            self._restored = torch.compile(self._restored, dynamic=False)
        self.skipped_in_a_row = 0
        self.views = SpatialViews(
            plan.patch_size,
            mirroring=self.recipe.mirroring,
            rotation=self.recipe.rotation,
            out_of_plane_rotation=plan.out_of_plane_rotation,
            scaling=(self.recipe.scaling[0], self.recipe.scaling[1]),
            translation=self.recipe.translation,
        )
        self.intensity = IntensityViews(self.recipe.intensity)

    @property
    def module(self) -> MACLNetwork:
        """The network itself, out of torch.compile."""
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network  # type: ignore

    def __call__(self, batch: dict, step: int) -> dict[str, float]:
        """Train on this rank's share of a batch; returns losses and statistics of the whole batch by name.

        Without a finite loss and gradient the weights stay as they are, on all ranks, and `skipped_in_a_row` counts.
        """
        # for a network with dropout; all else that is random has a generator of its own
        torch.manual_seed(_mix(self.recipe.seed, step))
        positions = distributed.gather(batch["positions"].to(self.device))
        self.loss.threshold = self.threshold(step)
        self.optimizer.zero_grad(set_to_none=True)
        # statistics of batch norms, which a forward pass with NaN would spoil for good
        buffers = [buffer.clone() for buffer in self.module.buffers()]
        patches = batch["data"].to(self.device, non_blocking=True)
        losses: dict[str, Tensor] = {"total": patches.new_zeros(())}
        outputs: dict[str, Tensor] = {}
        if self.module.is_contrastive:
            losses, outputs = self._backward(self.show(patches, step), positions, step)
        if self.module.restoration_head is not None:
            losses["restoration"] = self._restore(patches, step)
            losses["total"] = losses["total"] + self.recipe.weight_restoration * losses["restoration"]
        finite = self._update(step, losses["total"])
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            for buffer, before in zip(self.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return self._measure(losses, outputs, positions)

    def show(self, patches: Tensor, step: int) -> Shown:
        """What the branches see: down(I1), I2, down(V1), V2; None for a group that no loss asks for.

        V1 is not made smaller in a first training stage without downsampling.

        Args:
            patches: (n, C, *patch), this rank's share.
            step: number of the step.
        """
        patches = patches.to(self.device)
        small = self.plan.dominant_patch_size
        # the views of the whole batch are drawn, so that ranks show what one process would
        generator = torch.Generator().manual_seed(_mix(self.recipe.seed, step))
        view1, view2 = (self.views.draw(self.plan.batch_size, generator)[self.first : self.last] for _ in range(2))
        shown: list[Tensor | None] = [None] * 4
        if self.module.needs_invariance:
            shown[:2] = down(patches, small), patches
        if self.module.image_level:
            first_size = self.plan.patch_size if self._is_at_full_size(step) else small
            shown[2:] = self.views.apply(patches, view1, first_size), self.views.apply(patches, view2)
        if self.recipe.intensity:
            shown = [
                self._change_intensity(group, _mix(self.recipe.seed, step, number))
                if group is not None and on
                else group
                for number, (group, on) in enumerate(zip(shown, INTENSITY_ON[self.recipe.intensity_on], strict=True), 1)
            ]
        return tuple(shown)  # type: ignore[return-value]

    def _change_intensity(self, group: Tensor, seed: int) -> Tensor:
        """This rank's share of what one process would make of the whole batch."""
        generator = torch.Generator().manual_seed(seed)
        return self.intensity.apply(group, generator, batch_size=self.plan.batch_size, first=self.first)

    @torch.no_grad()
    def embed(self, patches: Tensor, step: int) -> dict[str, Tensor]:
        """What a step would compare, by name: embeddings of a batch, a few patches at a time as in training."""
        parts = self._cut(self.show(patches, step))
        # not what is compiled, which would be compiled once more for it
        with self._autocast():
            return self.module.project(_joined([self.module.features(*part) for part in parts]))

    def hide(self, patches: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """What restoration is shown, what it is to restore, and which voxels are hidden, as 0.

        That is the mean of an image as nnU-Net normalises most. Of channels whose mean it leaves anywhere, that mean is shown
        instead, and what is to be restored is standardised.

        Args:
            patches: (n, C, *patch), this rank's share.
            step: number of the step.
        """
        # beside those of the views
        generator = torch.Generator().manual_seed(_mix(self.recipe.seed, step, 5))
        blocks, share = self.module.hidden_blocks, self.recipe.restoration_share
        part, device = slice(self.first, self.last), patches.device
        mask = draw_mask(self.plan.batch_size, self.plan.patch_size, blocks, share, generator, part=part, device=device)
        whole, zero = standardise(patches, self.unnormalised)
        return torch.where(mask, zero, patches), whole, mask

    def _restore(self, patches: Tensor, step: int) -> Tensor:
        """The loss of the whole batch, its gradient added to this rank's, a few patches at a time."""
        shown, whole, mask = self.hide(patches, step)
        losses = []
        for first in range(0, len(patches), self.plan.patches_at_once):
            part = slice(first, first + self.plan.patches_at_once)
            with self._autocast():
                restored = self._restored(shown[part])
            loss = restoration_loss(restored, whole[part], mask[part])
            self._scaled(self.recipe.weight_restoration * loss.sum() / self.plan.batch_size).backward()
            losses.append(loss.detach())
        return distributed.gather(torch.cat(losses)).mean()

    def threshold(self, step: int) -> float:
        """t in force at a step, fraction of the volume."""
        warmup = self.recipe.threshold_warmup * self.steps
        return self.plan.threshold * min(1.0, step / warmup if warmup else 1.0)

    def _backward(self, shown: Shown, positions: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the whole batch's loss, and that loss and the embeddings it was computed from."""
        patches, at_once = self.last - self.first, self.plan.patches_at_once
        if at_once >= patches:
            with self._autocast():
                outputs = self.network(*shown)
            losses, everyone = self._losses(outputs, positions)
            self._scaled(self._stage_loss(losses, step)).backward()
            return losses, everyone
        # Gradient caching (Gao et al., 2021, https://arxiv.org/abs/2101.06983): features of all patches without a graph,
        # the gradient of the loss at these features, then the graph of a few patches at a time.
        parts = self._cut(shown)
        with torch.no_grad(), self._autocast():
            features = _joined([self._features(*part) for part in parts])
        features = {key: maps.requires_grad_() for key, maps in features.items()}
        with self._autocast():
            outputs = self.module.project(features)
        losses, everyone = self._losses(outputs, positions)
        self._scaled(self._stage_loss(losses, step)).backward()
        gradients = {key: feature.grad for key, feature in features.items() if feature.grad is not None}
        del features, outputs
        for first, part in zip(range(0, patches, at_once), parts, strict=True):
            with self._autocast():
                piece = self._features(*part)
            # an averaged encoder has no gradient; with two training stages some features have none
            used = [key for key in piece if piece[key].requires_grad and key in gradients]
            torch.autograd.backward(
                [piece[key] for key in used], [gradients[key][first : first + at_once] for key in used]
            )
        return losses, everyone

    def _cut(self, shown: Shown) -> list[Shown]:
        """The batch in parts of ``patches_at_once``."""
        patches, at_once = next(len(group) for group in shown if group is not None), self.plan.patches_at_once
        return [
            tuple(None if group is None else group[i : i + at_once] for group in shown)  # type: ignore[misc]
            for i in range(0, patches, at_once)
        ]

    def _autocast(self) -> AbstractContextManager:
        # as nnU-Net: autocast pays on a GPU only
        return torch.autocast(self.device.type) if self.device.type == "cuda" else nullcontext()

    def _losses(self, outputs: dict[str, Tensor], positions: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        everyone = {name: distributed.gather(output) for name, output in outputs.items()}
        return self.loss(everyone, positions), everyone

    def _in_decoder_stage(self, step: int) -> bool:
        """The second of two training stages: the dense loss alone, on the fixed encoder."""
        half = self.recipe.num_epochs // 2 * self.recipe.num_iterations_per_epoch
        return self.recipe.training_stages == 2 and step >= half

    def _is_at_full_size(self, step: int) -> bool:
        """The first of two training stages, where the recipe has no downsampling in it."""
        return self.recipe.full_size_first and not self._in_decoder_stage(step)

    def _stage_loss(self, losses: dict[str, Tensor], step: int) -> Tensor:
        """The total; with two training stages the dense loss waits for the second, which has it alone."""
        if self.recipe.training_stages == 1 or "dense" not in losses or "global" not in losses:
            return losses["total"]
        if self._in_decoder_stage(step):
            trained = ["dense"]
        else:
            # L_ER compares the two sizes of an image, so it has nothing to compare at full size
            trained = ["global"] if self._is_at_full_size(step) else ["global", "equivariance"]
        return sum(losses[name] * self.loss.weights[name] for name in trained if name in losses)  # type: ignore

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def _update(self, step: int, loss: Tensor) -> bool:
        """Move the weights, unless loss or gradient is not finite; returns whether it did. The schedule goes on anyway."""
        if self._in_decoder_stage(step):
            for name, parameter in self.module.named_parameters():
                if name.startswith(("encoder.", "auxiliary_encoder.")):
                    parameter.grad = None
        distributed.sum_gradients(self.module)
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), _MAX_GRADIENT_NORM)
        finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        if self.grad_scaler is not None:
            if finite:
                self.grad_scaler.step(self.optimizer)
            # a loss that is not finite before it is scaled says nothing about the scale
            self.grad_scaler.update(None if torch.isfinite(loss) else self.grad_scaler.get_scale())
        elif finite:
            self.optimizer.step()
        with warnings.catch_warnings():
            # torch warns of a first step that was skipped, as in mixed precision it may be
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        if finite:
            self.module.update_ema()
        return finite

    def _measure(self, losses: dict[str, Tensor], outputs: dict[str, Tensor], positions: Tensor) -> dict[str, float]:
        measured = {name: loss.item() for name, loss in losses.items()}
        if self.module.is_contrastive:
            measured["positives"] = monitoring.mean_positives(positions, self.loss.threshold)
        embeddings = outputs.get("global_dominant")
        if embeddings is None and "dense_dominant" in outputs:
            embeddings = outputs["dense_dominant"].flatten(2).mean(-1)
        if embeddings is not None:
            measured["embedding_variance"] = monitoring.embedding_variance(embeddings).item()
        if "bottleneck_dominant" in outputs:
            rms, between = monitoring.feature_statistics(outputs["bottleneck_dominant"])
            measured["bottleneck_rms"], measured["bottleneck_variance"] = rms.item(), between.item()
        return measured


def _joined(pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def _mix(*numbers: int) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
