"""RMSNorm for Megatron-core's norm slots."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lclm_kernels.rms_norm import rms_norm


class RMSNorm(torch.nn.Module):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467) over the last dim."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tp rank sees other tokens, so the gradients of this weight
        # are partial sums; Megatron-core adds up those that carry this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `[..., D]`; same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)
