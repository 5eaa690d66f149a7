"""Fine-tuning as the paper has it, for nnU-Net to find."""

from nnunetv2_macl.training.finetune_paper import nnUNetTrainerMACLPaper

__all__ = ["nnUNetTrainerMACLPaper"]
