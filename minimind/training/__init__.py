"""The one training loop, its objectives, optimizers, schedule, checkpoints and metrics."""
