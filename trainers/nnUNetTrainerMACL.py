"""The fine-tuning trainer and its shorter variants, where nnU-Net finds them.

To subclass, add a folder of your own to ``nnUNet_extTrainer``.
"""

from nnunetv2_macl.training.finetune import ShortFineTuning, nnUNetTrainerMACL, shorter_variants

__all__ = ["nnUNetTrainerMACL"]

globals().update(shorter_variants(nnUNetTrainerMACL))


class nnUNetTrainerMACL_short(ShortFineTuning, nnUNetTrainerMACL):
    pass


class nnUNetTrainerMACL_short_scratch(nnUNetTrainerMACL_short):
    """The same training without pre-trained weights, to compare with."""

    from_scratch = True
