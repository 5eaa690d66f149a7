"""The semi-supervised trainer and its shorter variants, where nnU-Net finds them."""

from nnunetv2_macl.semi_supervised.trainer import nnUNetTrainerMACLSemi
from nnunetv2_macl.training.finetune import ShortFineTuning

__all__ = ["nnUNetTrainerMACLSemi"]


class nnUNetTrainerMACLSemi_scratch(nnUNetTrainerMACLSemi):
    from_scratch = True


class nnUNetTrainerMACLSemi_short(ShortFineTuning, nnUNetTrainerMACLSemi):
    pass


class nnUNetTrainerMACLSemi_1epoch(nnUNetTrainerMACLSemi):
    finetuning_epochs = 1


class nnUNetTrainerMACLSemi_5epochs(nnUNetTrainerMACLSemi):
    finetuning_epochs = 5


class nnUNetTrainerMACLSemi_10epochs(nnUNetTrainerMACLSemi):
    finetuning_epochs = 10


class nnUNetTrainerMACLSemi_20epochs(nnUNetTrainerMACLSemi):
    finetuning_epochs = 20


class nnUNetTrainerMACLSemi_50epochs(nnUNetTrainerMACLSemi):
    finetuning_epochs = 50


class nnUNetTrainerMACLSemi_100epochs(nnUNetTrainerMACLSemi):
    finetuning_epochs = 100


class nnUNetTrainerMACLSemi_250epochs(nnUNetTrainerMACLSemi):
    finetuning_epochs = 250


class nnUNetTrainerMACLSemi_500epochs(nnUNetTrainerMACLSemi):
    finetuning_epochs = 500
