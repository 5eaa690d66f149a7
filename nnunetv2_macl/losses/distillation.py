"""Self-distillation: a student predicts the centred and sharpened output of its averaged teacher.

Source: DINO, Caron et al., ICCV 2021, https://arxiv.org/abs/2104.14294, Eq. 1, 2 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunetv2_macl.losses.precision import at_least_float32, autocast_disabled


class DistillationLoss(nn.Module):
    """Compute the cross-entropy between the outputs of a teacher and of a student.

    The teacher's outputs are centred and sharpened. Centring prevents that one output dominates for every image, and sharpening
    prevents that all outputs become equal. The loss does not update the centre, because a step may compute the loss several
    times. Call `update_centre` once per step.

    Args:
        outputs: K, length of an output.
        temperature: τ of the student.
        centre_momentum: Weight of the old centre, 0 to 1.

    Attributes:
        centre: (K,), the running mean of the teacher's outputs.
    """

    centre: Tensor

    def __init__(self, outputs: int, temperature: float = 0.1, centre_momentum: float = 0.9) -> None:
        super().__init__()
        self.temperature, self.centre_momentum = temperature, centre_momentum
        self.register_buffer("centre", torch.zeros(outputs))

    def targets(self, teacher: Tensor, temperature: float) -> Tensor:
        """Return the targets of the student, (..., K). They have no gradient, and each row sums to 1.

        Args:
            teacher: (..., K), outputs of the teacher.
            temperature: τ of the teacher, which is lower than that of the student.
        """
        with autocast_disabled(teacher):
            return ((at_least_float32(teacher.detach()) - self.centre) / temperature).softmax(-1)

    def forward(self, student: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each row, (...).

        Args:
            student: (..., K), outputs of the student.
            targets: (..., K), the result of `targets` for another view of the same images.
        """
        with autocast_disabled(student):
            return -(targets * (at_least_float32(student) / self.temperature).log_softmax(-1)).sum(-1)

    @torch.no_grad()
    def update_centre(self, teacher: Tensor) -> None:
        """Move the centre towards the mean of the teacher's outputs.

        Args:
            teacher: (..., K), all outputs of a step, of all processes.
        """
        mean = teacher.flatten(0, -2).mean(0, dtype=self.centre.dtype)
        self.centre.lerp_(mean, 1 - self.centre_momentum)
