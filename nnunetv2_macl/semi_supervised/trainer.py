"""Semi-supervised training: an averaged teacher labels unlabelled patches for the network that nnU-Net trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunetv2_macl.methods.averaging import averaged_copy, update_average
from nnunetv2_macl.semi_supervised.base import UnlabelledTraining
from nnunetv2_macl.semi_supervised.mixing import MIXINGS, Patches
from nnunetv2_macl.semi_supervised.settings import SemiSettings
from nnunetv2_macl.semi_supervised.targets import ignore_label_of, targets_of
from nnunetv2_macl.semi_supervised.unlabelled import PairedLoader, UnlabelledDataset
from nnunetv2_macl.training.seeded import BatchLoader
from nnunetv2_macl.training.user_errors import exit_on_user_error

# The teacher averages the student over about this share of the steps so far, and over 1,000 steps at most. A fixed long
# window would keep the first steps of a short training, and a window without a limit would lag behind in a long one.
_HORIZON = 0.05
_LONGEST_HORIZON = 1000
# separates the random numbers of mixing from those of the data loader
_MIXING_SEED = 2


class nnUNetTrainerMACLSemi(UnlabelledTraining):
    """Trains as nnU-Net does, and also learns from the unlabelled images of pre-training.

    A teacher, the average of the network over the last steps, labels as many unlabelled patches as there are labelled ones in
    a batch. The network learns these labels, where the teacher is confident, from strongly augmented patches. For labelled
    patches, loss, augmentation, oversampling and schedule are nnU-Net's.
    """

    semi: SemiSettings = SemiSettings()
    label_manager: LabelManager
    # None before the training starts and after it ends
    teacher: Any = None
    _predict: Any = None
    _teacher_state: Any = None
    steps_done = 0

    def check(self) -> None:
        super().check()
        self.semi.check(type(self).__name__)

    @exit_on_user_error
    def initialize(self) -> None:
        super().initialize()
        self.targets = targets_of(self.label_manager)
        self.partial_loss = self._build_partial_loss()

    def _build_partial_loss(self) -> nn.Module:
        """Return nnU-Net's loss for targets with ignored voxels, also where the data set has no ignore label."""
        own = self.label_manager
        labels = self.dataset_json["labels"] | {"ignore": ignore_label_of(own)}
        self.label_manager = self.plans_manager.get_label_manager(self.dataset_json | {"labels": labels})
        try:
            loss = self._build_loss()
        finally:
            self.label_manager = own
        whole = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
        if isinstance(whole, DC_and_BCE_loss) and not own.has_ignore_label:
            # With an ignore label nnU-Net sums the cross-entropy over the regions, and without one it takes the mean.
            whole.weight_ce /= len(own.foreground_regions)
        return loss

    # --- unlabelled images -------------------------------------------------------------------------------------------------

    def training_loader(self, loader: Any) -> BatchLoader:
        dataset = UnlabelledDataset(self.unlabelled_cases(), self._configuration.normalises_in_mask)
        return PairedLoader(loader, dataset, len(self.configuration_manager.patch_size), self.label_manager)

    # --- training ----------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self.teacher = averaged_copy(self.bare_network)
        if self._teacher_state is not None:
            self.teacher.load_state_dict(self._teacher_state)
            self._teacher_state = None
        self.teacher.eval()
        self._predict = torch.compile(self.teacher) if self._do_i_compile() else self.teacher

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.steps_done = self.current_epoch * self.num_iterations_per_epoch

    def train_step(self, batch: dict) -> dict:
        """Run one optimisation step on a labelled and an unlabelled batch.

        Returns:
            ``loss`` of the labels, ``unlabelled_loss`` before its weight, and ``confident``, the fraction of voxels that the
            teacher labelled. ``unlabelled_loss`` is NaN if the teacher labelled no voxel.
        """
        labelled, weak, strong = (batch[key].to(self.device, non_blocking=True) for key in ("data", "weak", "strong"))
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        target = self.targets.from_labels(target.to(self.device, non_blocking=True))
        with torch.no_grad(), self._autocast():
            predicted = self._predict(weak)
            # With deep supervision the first output is the one at full resolution.
            logits = predicted[0] if isinstance(predicted, (list, tuple)) else predicted
            pseudo = self.targets.from_logits(logits, self.semi.confidence)
            # The predictions at all depths are not needed during the passes of the student.
            del predicted, logits
        weight = self.semi.weight_at(self.steps_done / (self.num_epochs * self.num_iterations_per_epoch))
        generator = np.random.default_rng((self.seed, _MIXING_SEED, self.steps_done))
        mix = MIXINGS[self.semi.mixing]

        self.optimizer.zero_grad(set_to_none=True)
        losses = {"loss": torch.zeros((), device=self.device), "unlabelled_loss": torch.zeros((), device=self.device)}
        # The passes run one after the other, so that a step needs little more memory than nnU-Net's step.
        for lesson in mix(Patches(labelled, target), Patches(strong, pseudo), self.targets, generator):
            total = torch.zeros((), device=self.device)
            with self._autocast():
                output = self.network(lesson.images)
                for key, values, factor in (
                    ("loss", lesson.labels, 1.0),
                    ("unlabelled_loss", lesson.pseudo_labels, weight),
                ):
                    if values is not None:
                        loss = lesson.share * self._partial_loss_of(output, values)
                        losses[key] += loss.detach()
                        total = total + factor * loss
            (total if self.grad_scaler is None else self.grad_scaler.scale(total)).backward()
        self._update_weights()
        confident = 1 - self.targets.ignored(pseudo).float().mean()
        # Without any labelled voxel nnU-Net's Dice loss has its best value, -1.
        losses["unlabelled_loss"] = losses["unlabelled_loss"].where(confident > 0, torch.nan)
        return {key: value.cpu().numpy() for key, value in (losses | {"confident": confident}).items()}

    def _partial_loss_of(self, output: Tensor | list[Tensor], target: Tensor) -> Tensor:
        """Return the loss of a target at full resolution, which is subsampled for deep supervision as nnU-Net does."""
        if not isinstance(self.partial_loss, DeepSupervisionWrapper):
            return self.partial_loss(output, target)
        shapes = [level.shape[2:] for level in output]
        whole = target.float()
        targets = [interpolate(whole, shape, mode="nearest-exact").to(target.dtype) for shape in shapes]
        return self.partial_loss(output, targets)

    def _update_weights(self) -> None:
        """Update the weights as nnU-Net's training step does, and then the teacher."""
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        self.steps_done += 1
        horizon = min(1 + _HORIZON * self.steps_done, _LONGEST_HORIZON)
        update_average(self.teacher, self.bare_network, decay=1 - 1 / horizon)

    def _autocast(self) -> Any:
        # nnU-Net computes in half precision on CUDA only.
        return torch.autocast("cuda") if self.device.type == "cuda" else dummy_context()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        outputs = collate_outputs(train_outputs)
        unlabelled = outputs["unlabelled_loss"][~np.isnan(outputs["unlabelled_loss"])]
        weight = self.semi.weight_at(self.steps_done / (self.num_epochs * self.num_iterations_per_epoch))
        self.print_to_log_file(
            f"unlabelled_loss {unlabelled.mean() if unlabelled.size else np.nan:.4f}, weight {weight:.3f}, voxels that the "
            f"teacher labelled {np.mean(outputs['confident']):.1%}"
        )

    def on_train_end(self) -> None:
        # Only a training that continues needs the teacher.
        self.teacher = self._predict = None
        super().on_train_end()

    # --- checkpoints -------------------------------------------------------------------------------------------------------

    def checkpoint_content(self) -> dict[str, Any]:
        teacher = None if self.teacher is None else self.teacher.state_dict()
        return super().checkpoint_content() | {"macl_teacher": teacher}

    def load_checkpoint_content(self, checkpoint: dict[str, Any]) -> None:
        super().load_checkpoint_content(checkpoint)
        self._teacher_state = checkpoint.get("macl_teacher")
