"""The pre-training stage, for nnU-Net to find. Subclass it in a folder of your own that nnUNet_extTrainer names too."""

from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain

__all__ = ["nnUNetTrainerMACLPretrain"]
