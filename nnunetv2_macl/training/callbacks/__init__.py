"""What a pre-training run does besides training. Each task is one callback; `base.Callback` is their interface."""
