"""The training loop and its parts; distill and finetune call it."""
