"""Seeds of torch's generators."""

from hashlib import sha256

import torch


def seed_everything(seed: int) -> None:
    """Seed torch's generators: new weights and dropout. Views and order have seeds of their own."""
    torch.manual_seed(seed)


def seed_rank(seed: int, *, rank: int, step: int) -> None:
    """Seed torch's generators for what a rank draws from a step on, such as dropout."""
    torch.manual_seed(int(sha256(f"{seed}/{rank}/{step}".encode()).hexdigest()[:15], 16))
