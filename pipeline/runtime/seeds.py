"""Seeds of torch's generators."""

from hashlib import sha256

import torch


def seed_everything(seed: int) -> None:
    """Seed torch's generators, for weights and dropout; views and order have other seeds."""
    torch.manual_seed(seed)


def seed_rank(seed: int, *, rank: int, step: int) -> None:
    """Seed torch's generators for what a rank draws from a step on, for example dropout."""
    torch.manual_seed(int(sha256(f"{seed}/{rank}/{step}".encode()).hexdigest()[:15], 16))
