"""Output projection and cross entropy in one, chunk by chunk."""

from .ops import linear_cross_entropy, per_token_loss

__all__ = ["linear_cross_entropy", "per_token_loss"]
