"""The one training loop: batches, step, state, checkpoints, validation."""
