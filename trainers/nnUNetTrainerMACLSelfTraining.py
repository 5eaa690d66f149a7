"""The self-training trainer, its shorter variants and its further rounds, where nnU-Net finds them."""

from nnunetv2_macl.semi_supervised.self_training import nnUNetTrainerMACLSelfTraining
from nnunetv2_macl.training.finetune import ShortFineTuning, shorter_variants

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


class nnUNetTrainerMACLSelfTraining_short_scratch(nnUNetTrainerMACLSelfTraining_short):
    from_scratch = True
    default_teacher = "nnUNetTrainerMACL_short_scratch"


for _name, _variant in shorter_variants(nnUNetTrainerMACLSelfTraining).items():
    _variant.default_teacher = _name.replace("SelfTraining", "")
    globals()[_name] = _variant
