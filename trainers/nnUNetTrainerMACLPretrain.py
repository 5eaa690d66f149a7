"""The pre-training trainer, where nnU-Net finds it. To subclass, add a folder of your own to ``nnUNet_extTrainer``."""

from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain

__all__ = ["nnUNetTrainerMACLPretrain"]
