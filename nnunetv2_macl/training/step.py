"""One step of MACL: what the branches see, the losses, their gradients, the update of the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

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
from nnunetv2_macl.restoration import restoration_loss
from nnunetv2_macl.training.draws import StepDraws, StepNumbers, derive_seed
from nnunetv2_macl.views import down, enlarge_mask, standardise

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
        self.was_skipped, self.skipped_in_a_row = False, 0
        self.draws = StepDraws(
            plan,
            (self.first, self.last),
            self.module.image_channels,
            [self.module.needs_invariance] * 2 + [self.module.image_level] * 2,
            self.module.hidden_blocks,
        )
        self.gradient_sum = distributed.GradientSum(self.module)

    @property
    def module(self) -> MACLNetwork:
        """The network itself, out of torch.compile."""
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network  # type: ignore

    def __call__(self, batch: dict, step: int) -> dict[str, float]:
        """Train on this rank's share of a batch; returns losses and statistics of the whole batch by name.

        Without a finite loss and gradient the weights stay as they are, on all ranks, and `was_skipped` is True.

        Args:
            batch: ``data`` (n, C, *patch), ``positions`` (n, 3), and ``numbers``, what `StepDraws` drew for this step. They
                are drawn here where they are not in it.
            step: Number of the step.
        """
        # For a network with dropout. All else that is random has a generator of its own.
        torch.manual_seed(derive_seed(self.recipe.seed, step))
        numbers = (batch["numbers"] if "numbers" in batch else self.draws(step)).to(self.device)
        patches = batch["data"].to(self.device, non_blocking=True)
        positions = distributed.gather(batch["positions"].to(self.device, non_blocking=True), self.plan.batch_size)
        self.loss.threshold = self.threshold(step)
        self.optimizer.zero_grad(set_to_none=True)
        # A forward pass with NaN would spoil the statistics of batch norms for good.
        buffers = [buffer.clone() for buffer in self.module.buffers()]
        losses: dict[str, Tensor] = {"total": patches.new_zeros(())}
        outputs: dict[str, Tensor] = {}
        restores = self.module.restoration_head is not None
        if self.module.is_contrastive:
            losses, outputs = self._backward(self._show(patches, numbers, step), positions, step, is_last=not restores)
        if restores:
            losses["restoration"] = self._restore(patches, numbers)
            losses["total"] = losses["total"] + self.recipe.weight_restoration * losses["restoration"]
        measured = self._update(step, losses, self._statistics(outputs, positions))
        if self.was_skipped:
            for buffer, before in zip(self.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return measured

    def show(self, patches: Tensor, step: int) -> Shown:
        """What the branches see: down(I1), I2, down(V1), V2; None for a group that no loss asks for.

        V1 is not made smaller in a first training stage without downsampling.

        Args:
            patches: (n, C, *patch), this rank's share.
            step: number of the step.
        """
        return self._show(patches.to(self.device), self.draws(step).to(self.device), step)

    def _show(self, patches: Tensor, numbers: StepNumbers, step: int) -> Shown:
        small, spatial = self.plan.dominant_patch_size, self.draws.spatial
        shown: list[Tensor | None] = [None] * 4
        if self.module.needs_invariance:
            shown[:2] = down(patches, small), patches
        if spatial is not None and numbers.views is not None:
            view1, view2 = numbers.views
            first_size = self.plan.patch_size if self._is_at_full_size(step) else small
            shown[2:] = spatial.apply(patches, view1, first_size), spatial.apply(patches, view2)
        return tuple(  # type: ignore[return-value]
            group if group is None or changes is None else self.draws.intensity.apply(group, changes)
            for group, changes in zip(shown, numbers.intensity, strict=True)
        )

    @torch.no_grad()
    def embed(self, patches: Tensor, step: int) -> dict[str, Tensor]:
        """What a step would compare, by name: embeddings of a batch, a few patches at a time as in training."""
        parts = self._cut(self.show(patches, step))
        # not what is compiled, which would be compiled once more for it
        with self._autocast():
            return self.module.project(_joined([self.module.features(*part) for part in parts]))

    def hide(self, patches: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the patches with hidden voxels, what is to be restored of them, and which voxels are hidden.

        Hidden voxels are 0, the mean of an image as nnU-Net normalises most. In channels that nnU-Net does not normalise to zero
        mean, they are the channel's mean, and what is to be restored is standardised.

        Args:
            patches: (n, C, *patch), this rank's share.
            step: number of the step.
        """
        return self._hide(patches, self.draws(step).to(patches.device))

    def _hide(self, patches: Tensor, numbers: StepNumbers) -> tuple[Tensor, Tensor, Tensor]:
        assert numbers.mask is not None
        mask = enlarge_mask(numbers.mask, patches.shape[2:])
        whole, zero = standardise(patches, self.unnormalised)
        return torch.where(mask, zero, patches), whole, mask

    def _restore(self, patches: Tensor, numbers: StepNumbers) -> Tensor:
        """The loss of the whole batch, its gradient added to this rank's, a few patches at a time."""
        shown, whole, mask = self._hide(patches, numbers)
        losses, at_once = [], self.plan.patches_at_once
        for first in range(0, len(patches), at_once):
            part = slice(first, first + at_once)
            with self._autocast():
                restored = self._restored(shown[part])
            loss = restoration_loss(restored, whole[part], mask[part])
            with self._last_backward(first + at_once >= len(patches)):
                self._scaled(self.recipe.weight_restoration * loss.sum() / self.plan.batch_size).backward()
            losses.append(loss.detach())
            # otherwise they would stay while the next part is computed
            del restored, loss
        return distributed.gather(torch.cat(losses), self.plan.batch_size).mean()

    def _last_backward(self, is_last: bool) -> AbstractContextManager:
        return self.gradient_sum.last_backward() if is_last else nullcontext()

    def threshold(self, step: int) -> float:
        """t in force at a step, fraction of the volume."""
        warmup = self.recipe.threshold_warmup * self.steps
        return self.plan.threshold * min(1.0, step / warmup if warmup else 1.0)

    def _backward(
        self, shown: Shown, positions: Tensor, step: int, *, is_last: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the whole batch's loss, and that loss and the embeddings it was computed from."""
        patches, at_once = self.last - self.first, self.plan.patches_at_once
        # by the largest share, because all ranks have to exchange the same in the same order
        if at_once >= distributed.share(self.plan.batch_size, 0)[1]:
            with self._autocast():
                outputs = self.network(*shown)
            losses, everyone = self._losses(outputs, positions)
            with self._last_backward(is_last):
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
            with self._last_backward(is_last and first + at_once >= patches):
                torch.autograd.backward(
                    [piece[key] for key in used], [gradients[key][first : first + at_once] for key in used]
                )
            # otherwise its maps would stay while the next part is computed
            del piece
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
        everyone = distributed.gather_all(outputs, self.plan.batch_size)
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

    def _update(self, step: int, losses: dict[str, Tensor], statistics: dict[str, Tensor]) -> dict[str, float]:
        """Move the weights, unless loss or gradient is not finite; the schedule goes on anyway. Returns all values by name."""
        self.gradient_sum.finish()
        if self._in_decoder_stage(step):
            for name, parameter in self.module.named_parameters():
                if name.startswith(("encoder.", "auxiliary_encoder.")):
                    parameter.grad = None
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), _MAX_GRADIENT_NORM)
        # All that the CPU wants to know of a step is read at once, because each reading waits for the GPU.
        values = {**losses, **statistics}
        *read, gradient_norm = torch.stack([v.detach().to(norm.dtype) for v in (*values.values(), norm)]).tolist()
        measured = dict(zip(values, read, strict=True))
        loss_is_finite = math.isfinite(measured["total"])
        self.was_skipped = not (loss_is_finite and math.isfinite(gradient_norm))
        self._count_skipped(loss_is_finite)
        if self.grad_scaler is not None:
            if not self.was_skipped:
                self.grad_scaler.step(self.optimizer)
            # a loss that is not finite before it is scaled says nothing about the scale
            self.grad_scaler.update(None if loss_is_finite else self.grad_scaler.get_scale())
        elif not self.was_skipped:
            self.optimizer.step()
        with warnings.catch_warnings():
            # torch warns of a first step that was skipped, as in mixed precision it may be
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        if not self.was_skipped:
            self.module.update_ema()
        return measured

    def _count_skipped(self, loss_is_finite: bool) -> None:
        """Count skipped steps that mixed precision does not explain: it skips a few until its scale is small enough."""
        if not self.was_skipped:
            self.skipped_in_a_row = 0
        elif not loss_is_finite or self.grad_scaler is None or self.grad_scaler.get_scale() <= 1:
            self.skipped_in_a_row += 1

    def _statistics(self, outputs: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Return the statistics that the log shows with the losses. They stay on the device."""
        found: dict[str, Tensor] = {}
        if self.module.is_contrastive:
            found["positives"] = monitoring.mean_positives(positions, self.loss.threshold)
        embeddings = outputs.get("global_dominant")
        if embeddings is None and "dense_dominant" in outputs:
            embeddings = outputs["dense_dominant"].flatten(2).mean(-1)
        if embeddings is not None:
            found["embedding_variance"] = monitoring.embedding_variance(embeddings)
        if "bottleneck_dominant" in outputs:
            rms, between = monitoring.feature_statistics(outputs["bottleneck_dominant"])
            found["bottleneck_rms"], found["bottleneck_variance"] = rms, between
        return found


def _joined(pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
