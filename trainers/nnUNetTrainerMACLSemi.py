"""The semi-supervised trainer and its shorter variants, where nnU-Net finds them."""

from nnunetv2_macl.semi_supervised.trainer import nnUNetTrainerMACLSemi
from nnunetv2_macl.training.finetune import ShortFineTuning, shorter_variants

__all__ = ["nnUNetTrainerMACLSemi"]

globals().update(shorter_variants(nnUNetTrainerMACLSemi))


class nnUNetTrainerMACLSemi_scratch(nnUNetTrainerMACLSemi):
    from_scratch = True


class nnUNetTrainerMACLSemi_short(ShortFineTuning, nnUNetTrainerMACLSemi):
    pass


class nnUNetTrainerMACLSemi_short_scratch(nnUNetTrainerMACLSemi_short):
    from_scratch = True
