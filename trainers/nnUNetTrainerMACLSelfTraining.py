"""The self-training trainer, its shorter variants and its further rounds, where nnU-Net finds them."""

from nnunetv2_macl.semi_supervised.self_training import nnUNetTrainerMACLSelfTraining
from nnunetv2_macl.training.finetune import ShortFineTuning

__all__ = ["nnUNetTrainerMACLSelfTraining"]


class nnUNetTrainerMACLSelfTraining_round2(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACLSelfTraining"


class nnUNetTrainerMACLSelfTraining_round3(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACLSelfTraining_round2"


class nnUNetTrainerMACLSelfTraining_scratch(nnUNetTrainerMACLSelfTraining):
    from_scratch = True
    default_teacher = "nnUNetTrainer"


class nnUNetTrainerMACLSelfTraining_short(ShortFineTuning, nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_short"


class nnUNetTrainerMACLSelfTraining_1epoch(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_1epoch"
    finetuning_epochs = 1


class nnUNetTrainerMACLSelfTraining_5epochs(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_5epochs"
    finetuning_epochs = 5


class nnUNetTrainerMACLSelfTraining_10epochs(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_10epochs"
    finetuning_epochs = 10


class nnUNetTrainerMACLSelfTraining_20epochs(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_20epochs"
    finetuning_epochs = 20


class nnUNetTrainerMACLSelfTraining_50epochs(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_50epochs"
    finetuning_epochs = 50


class nnUNetTrainerMACLSelfTraining_100epochs(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_100epochs"
    finetuning_epochs = 100


class nnUNetTrainerMACLSelfTraining_250epochs(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_250epochs"
    finetuning_epochs = 250


class nnUNetTrainerMACLSelfTraining_500epochs(nnUNetTrainerMACLSelfTraining):
    default_teacher = "nnUNetTrainerMACL_500epochs"
    finetuning_epochs = 500
