"""The trainer classes that nnU-Net runs: pre-training and fine-tuning."""
