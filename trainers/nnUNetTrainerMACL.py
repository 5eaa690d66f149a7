"""The fine-tuning trainer and its shorter variants, where nnU-Net finds them.

To subclass, add a folder of your own to ``nnUNet_extTrainer``.
"""

from nnunetv2_macl.training.finetune import ShortFineTuning, nnUNetTrainerMACL

__all__ = ["nnUNetTrainerMACL"]


class nnUNetTrainerMACL_1epoch(nnUNetTrainerMACL):
    finetuning_epochs = 1


class nnUNetTrainerMACL_5epochs(nnUNetTrainerMACL):
    finetuning_epochs = 5


class nnUNetTrainerMACL_10epochs(nnUNetTrainerMACL):
    finetuning_epochs = 10


class nnUNetTrainerMACL_20epochs(nnUNetTrainerMACL):
    finetuning_epochs = 20


class nnUNetTrainerMACL_50epochs(nnUNetTrainerMACL):
    finetuning_epochs = 50


class nnUNetTrainerMACL_100epochs(nnUNetTrainerMACL):
    finetuning_epochs = 100


class nnUNetTrainerMACL_250epochs(nnUNetTrainerMACL):
    finetuning_epochs = 250


class nnUNetTrainerMACL_500epochs(nnUNetTrainerMACL):
    finetuning_epochs = 500


class nnUNetTrainerMACL_short(ShortFineTuning, nnUNetTrainerMACL):
    pass
