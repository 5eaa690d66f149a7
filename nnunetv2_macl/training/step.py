"""Run one training step of any method: views, losses, gradients, and the update of the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim.lr_scheduler import LambdaLR

from nnunetv2_macl import distributed
from nnunetv2_macl.methods.base import Method, Progress, derive_seed, to_device
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.methods.statistics import batch_rank, embedding_variance
from nnunetv2_macl.planning.memory import check_batch_can_be_split
from nnunetv2_macl.planning.plan import MACLPlan
from nnunetv2_macl.training.draws import StepDraws

_MAX_GRADIENT_NORM = 12  # as in nnU-Net
_DROPOUT = 2**32 - 1  # a stream of random numbers that no method draws from

Tensors = dict[str, Tensor]


class TrainingStep:
    """Runs one optimisation step on a batch.

    Every random number is a function of (seed, step). Each rank processes its share of the batch of a single process.

    Args:
        network: The model that is pre-trained, compiled or not.
        optimizer, scheduler: Both are stepped once per call.
        grad_scaler: Gradient scaler; None without mixed precision in float16.
        plan: Plan of the run, with patch sizes and batch size.
        device: Device of the network.

    Raises:
        UserError: The plan computes a batch in parts, but the network mixes the patches of a batch.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR,
        grad_scaler: torch.amp.GradScaler | None,
        plan: MACLPlan,
        device: torch.device,
    ) -> None:
        self.optimizer, self.scheduler, self.grad_scaler = optimizer, scheduler, grad_scaler
        self.plan, self.recipe, self.device = plan, plan.get_recipe(), device
        self.model: PretrainingModel = network._orig_mod if isinstance(network, OptimizedModule) else network  # type: ignore
        self.methods = list(self.model)
        self.steps = self.progress(0).steps
        self.first, self.last = distributed.local_slice(plan.batch_size)
        check_batch_can_be_split(self.model, plan.patches_at_once, self.last - self.first)
        self._encode: dict[str, Callable[[Tensors], Tensors]] = {
            # static shapes, because parts have at most two sizes and dynamic shapes often fail to compile
            method.name: torch.compile(method.encode, dynamic=False)
            if isinstance(network, OptimizedModule)
            else method.encode
            for method in self.methods
        }
        self.was_skipped, self.skipped_in_a_row = False, 0
        self.draws, self._draws_of_all = (
            StepDraws(self.model.views, plan, share, self.model.network.image_channels)
            for share in ((self.first, self.last), (0, plan.batch_size))
        )
        # The heads are last, because every backward pass adds to the network's gradient, so that it is complete only after the
        # last one.
        self.gradient_sum = distributed.GradientSum(self.model.network, self.model.methods)

    def progress(self, step: int) -> Progress:
        """Return how far the run is at a step."""
        return Progress(step, self.recipe.num_epochs, self.recipe.num_iterations_per_epoch)

    def __call__(self, batch: dict, step: int) -> dict[str, float]:
        """Train on this rank's share of a batch, and return losses and statistics of the whole batch by name.

        If the loss or the gradient is not finite, the weights do not change on any rank, and `was_skipped` is True.

        Args:
            batch: ``data`` (n, C, *patch), or (2n, C, *patch) with neighbours; ``positions`` (n, 3); and optionally ``numbers``,
                the random numbers of `StepDraws` for this step.
            step: Number of the step.
        """
        # This seed is for dropout. Everything else that is random has its own generator. Each rank has its own seed.
        torch.manual_seed(derive_seed(self.recipe.seed, step, _DROPOUT, self.first))
        progress = self.progress(step)
        numbers = to_device(batch["numbers"] if "numbers" in batch else self.draws(step), self.device)
        patches = batch["data"].to(self.device, non_blocking=True)
        positions = distributed.gather(batch["positions"].to(self.device, non_blocking=True), self.plan.batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        # Back up the buffers, because a forward pass with NaN would corrupt batch-norm statistics permanently.
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        losses: Tensors = {"total": patches.new_zeros(())}
        statistics: Tensors = {}
        everyone: list[Tensors] = []
        for method in self.methods:
            backward = self._backward if method.couples_samples else self._backward_one_by_one
            views = self.model.make_views(method, patches, numbers[method.name], progress)
            found, embeddings = backward(method, views, positions, progress, is_last=method is self.methods[-1])
            losses |= found | {"total": losses["total"] + found["total"]}
            statistics |= self._statistics(method, embeddings, positions)
            everyone.append(embeddings)
            # free the memory before the next method is computed
            del views
        measured = self._update(progress, losses, statistics)
        if self.was_skipped:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        else:
            for method, embeddings in zip(self.methods, everyone, strict=True):
                method.after_step(embeddings, progress)
        return measured

    def show(self, patches: Tensor, step: int) -> dict[str, Tensors]:
        """Return the views of each method, by its name.

        Args:
            patches: This rank's share, (n, C, *patch), or (2n, C, *patch) with neighbours.
            step: Number of the step.
        """
        numbers, patches = to_device(self.draws(step), self.device), patches.to(self.device)
        return {m.name: self.model.make_views(m, patches, numbers[m.name], self.progress(step)) for m in self.methods}

    @torch.no_grad()
    def representations(self, patches: Tensor, step: int) -> tuple[Tensor, Tensor] | None:
        """Return the embeddings of two views of each patch, (N, C) each, of the first method that compares embeddings.

        Returns None if no method does. The patches are processed in parts, as in training, and on this rank alone.

        Args:
            patches: The whole batch, (N, C, *patch), or (2N, C, *patch) with neighbours.
            step: Number of the step.
        """
        for method in self.methods:
            if not method.couples_samples:
                continue
            numbers = to_device(self._draws_of_all(step), self.device)[method.name]
            views = self.model.make_views(method, patches.to(self.device), numbers, self.progress(step))
            # not the compiled function, which would be compiled once more without gradients
            with self._autocast():
                embeddings = method.project(_joined([method.encode(part) for part in self._cut(views)]))
            found = method.representations(embeddings)
            if found is not None:
                return found
        return None

    def _backward_one_by_one(
        self, method: Method, views: Tensors, positions: Tensor, progress: Progress, *, is_last: bool
    ) -> tuple[Tensors, Tensors]:
        """Add the gradient of a loss of single patches. Return the losses of the whole batch, and no embeddings."""
        found: dict[str, list[Tensor]] = {}
        parts = list(self._cut(views))
        for number, part in enumerate(parts, 1):
            with self._autocast():
                embeddings = method.project(self._encode[method.name](part))
            losses = method.losses(embeddings, positions, progress)
            with self._last_backward(is_last and number == len(parts)):
                self._scaled(losses["total"].sum() / self.plan.batch_size).backward()
            for name, loss in losses.items():
                found.setdefault(name, []).append(loss.detach())
            # free the memory before the next part is computed
            del embeddings, losses
        everyone = distributed.gather_all(
            {name: torch.cat(values)[:, None] for name, values in found.items()}, self.plan.batch_size
        )
        return {name: values.squeeze(1).mean() for name, values in everyone.items()}, {}

    def _backward(
        self, method: Method, views: Tensors, positions: Tensor, progress: Progress, *, is_last: bool
    ) -> tuple[Tensors, Tensors]:
        """Add the gradient of a loss of the whole batch. Return the losses and the embeddings of the whole batch."""
        encode = self._encode[method.name]
        at_once = self.plan.patches_at_once
        # the largest share decides, because all ranks must communicate in the same order
        if at_once >= distributed.local_slice(self.plan.batch_size, 0)[1]:
            with self._autocast():
                outputs = method.project(encode(views))
            everyone = distributed.gather_all(outputs, self.plan.batch_size)
            losses = method.losses(everyone, positions, progress)
            with self._last_backward(is_last):
                self._scaled(losses["total"]).backward()
            return losses, everyone
        # Gradient caching (Gao et al., 2021, https://arxiv.org/abs/2101.06983): compute the features of all patches without a
        # graph, then the gradient of the loss at these features, then the backward pass of a few patches at a time.
        parts = list(self._cut(views))
        with torch.no_grad(), self._autocast():
            features = _joined([encode(part) for part in parts])
        features = {key: maps.requires_grad_() for key, maps in features.items()}
        with self._autocast():
            outputs = method.project(features)
        everyone = distributed.gather_all(outputs, self.plan.batch_size)
        losses = method.losses(everyone, positions, progress)
        self._scaled(losses["total"]).backward()
        gradients = {key: feature.grad for key, feature in features.items() if feature.grad is not None}
        del features, outputs
        for number, part in enumerate(parts, 1):
            rows = slice((number - 1) * at_once, number * at_once)
            with self._autocast():
                piece = encode(part)
            # an averaged encoder has no gradient; with two training stages some features have none
            used = [key for key in piece if piece[key].requires_grad and key in gradients]
            with self._last_backward(is_last and number == len(parts)):
                torch.autograd.backward([piece[key] for key in used], [gradients[key][rows] for key in used])
            # free the maps before the next part is computed
            del piece
        return losses, everyone

    def _cut(self, views: Tensors) -> Iterator[Tensors]:
        """Yield the batch in parts of ``patches_at_once``."""
        patches, at_once = len(next(iter(views.values()))), self.plan.patches_at_once
        for first in range(0, patches, at_once):
            yield {name: view[first : first + at_once] for name, view in views.items()}

    def _last_backward(self, is_last: bool) -> AbstractContextManager:
        return self.gradient_sum.last_backward() if is_last else nullcontext()

    def _autocast(self) -> AbstractContextManager:
        # as in nnU-Net, because autocast is faster only on a GPU
        return torch.autocast(self.device.type) if self.device.type == "cuda" else nullcontext()

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def _update(self, progress: Progress, losses: Tensors, statistics: Tensors) -> dict[str, float]:
        """Update the weights if loss and gradient are finite, step the schedule in any case, and return all values by name."""
        self.gradient_sum.finish()
        for method in self.methods:
            method.withhold_gradients(progress)
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRADIENT_NORM)
        # Read all values at once, because each read waits for the GPU.
        values = {**losses, **statistics}
        *read, gradient_norm = torch.stack([v.detach().to(norm.dtype) for v in (*values.values(), norm)]).tolist()
        measured = dict(zip(values, read, strict=True))
        loss_is_finite = math.isfinite(measured["total"])
        self.was_skipped = not (loss_is_finite and math.isfinite(gradient_norm))
        self._count_skipped(loss_is_finite)
        if self.grad_scaler is not None:
            if not self.was_skipped:
                self.grad_scaler.step(self.optimizer)
            # keep the scale if the unscaled loss is not finite, because the scale is not the cause
            self.grad_scaler.update(None if loss_is_finite else self.grad_scaler.get_scale())
        elif not self.was_skipped:
            self.optimizer.step()
        with warnings.catch_warnings():
            # torch warns if the first step was skipped, which is normal in mixed precision
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        return measured

    def _count_skipped(self, loss_is_finite: bool) -> None:
        """Count consecutive skipped steps, except those that mixed precision skips until its scale is small enough."""
        if not self.was_skipped:
            self.skipped_in_a_row = 0
        elif not loss_is_finite or self.grad_scaler is None or self.grad_scaler.get_scale() <= 1:
            self.skipped_in_a_row += 1

    @staticmethod
    def _statistics(method: Method, embeddings: Tensors, positions: Tensor) -> Tensors:
        """Return the statistics that the log shows with the losses, as tensors on the device."""
        found = method.measure(embeddings, positions)
        if (two := method.representations(embeddings)) is not None:
            found |= {"embedding_variance": embedding_variance(two[0]), "embedding_rank": batch_rank(two[0])}
        return found


def _joined(pieces: Sequence[Tensors]) -> Tensors:
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
