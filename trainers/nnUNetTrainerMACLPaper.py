"""The trainer that fine-tunes as in the paper, where nnU-Net finds it."""

from nnunetv2_macl.training.finetune_paper import nnUNetTrainerMACLPaper

__all__ = ["nnUNetTrainerMACLPaper"]
